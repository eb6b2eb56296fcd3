/* Tasks on torch's own threads: the OpenMP runtime that torch loaded is handed over by set_threading. */
#ifndef PARALLEL_H
#define PARALLEL_H

typedef void (*task_function)(void *context, int task);

/* gomp_parallel: libgomp's GOMP_parallel; max_threads: its omp_get_max_threads. NULL: everything runs on the caller. */
void set_threading(void *gomp_parallel, void *max_threads);

/* Threads that parallel_for uses, torch.get_num_threads() of the calling thread. */
int num_threads(void);

/* Runs task 0 .. num_tasks - 1, each once, in any order. Tasks are taken one by one, so they may differ in length. */
void parallel_for(int num_tasks, task_function task, void *context);

#endif
