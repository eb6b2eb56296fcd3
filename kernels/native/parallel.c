#include "parallel.h"

#include <stdatomic.h>
#include <stddef.h>

typedef void (*gomp_parallel_function)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*max_threads_function)(void);

static gomp_parallel_function gomp_parallel;
static max_threads_function omp_max_threads;

void set_threading(void *parallel, void *max_threads) {
    gomp_parallel = (gomp_parallel_function)parallel;
    omp_max_threads = (max_threads_function)max_threads;
}

int num_threads(void) { return gomp_parallel && omp_max_threads ? omp_max_threads() : 1; }

struct queue {
    task_function task;
    void *context;
    atomic_int next;
    int num_tasks;
};

static void work(void *argument) {
    struct queue *queue = argument;
    for (;;) {
        int task = atomic_fetch_add_explicit(&queue->next, 1, memory_order_relaxed);
        if (task >= queue->num_tasks) return;
        queue->task(queue->context, task);
    }
}

void parallel_for(int num_tasks, task_function task, void *context) {
    int threads = num_threads();
    if (num_tasks <= 1 || threads <= 1) {
        for (int i = 0; i < num_tasks; i++) task(context, i);
        return;
    }
    struct queue queue = {task, context, 0, num_tasks};
    gomp_parallel(work, &queue, (unsigned)(threads < num_tasks ? threads : num_tasks), 0);
}
