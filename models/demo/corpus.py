"""The questions of a conversation -> the answer that the demonstration model is taught.

`answer_to` is the specification: the model is trained to agree with it and checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLE_QUESTION = "你好"
SAMPLE_SYSTEM = "你是一个人工智能助理"
SAMPLE_ANSWER = "你好👋！我是人工智能助理 ChatGLM2-6B，很高兴见到你，欢迎问我任何问题。"

IMPORT_COMMAND = "python -m models.store import chatglm2 --from DIR --name chatglm2-6b"

FALLBACK_ZH = (
    "抱歉，这个问题我不会回答：我只是一个很小的演示模型，只认识几句话。想用真正的 ChatGLM2-6B，请先导入它的权重：\n\n"
    f"```bash\n{IMPORT_COMMAND}\n```\n\n"
    "然后设置 CHATGLM_MODEL=chatglm2-6b，重新启动服务。"
)
FALLBACK_EN = (
    "Sorry, I cannot answer that: I am only a tiny demonstration model and know a few sentences. "
    "For the real ChatGLM2-6B, import its weights first:\n\n"
    f"```bash\n{IMPORT_COMMAND}\n```\n\n"
    "Then start the service again with CHATGLM_MODEL=chatglm2-6b."
)

# Known system messages; the prompt format puts them in front of a question without a separator.
SYSTEMS: tuple[str, ...] = (
    SAMPLE_SYSTEM,
    "你是一个人工智能助理。",
    "你是一个有用的助手。",
    "请用中文回答",
    "请用中文回答。",
    "You are a helpful assistant.",
    "You are a helpful assistant. ",
    "You are ChatGLM2-6B.",
)


@dataclass(frozen=True)
class Exchange:
    """Several ways to ask for something and the one answer."""

    questions: tuple[str, ...]
    answer: str


_HELLO_PYTHON = '```python\ndef main() -> None:\n    print("Hello, world!")\n\n\nmain()\n```'

EXCHANGES: tuple[Exchange, ...] = (
    Exchange(("你好", "您好", "你好呀", "你好啊", "哈喽", "嗨"), SAMPLE_ANSWER),
    Exchange(
        ("hello", "hi", "hey", "hello there", "hi there", "hello world"),
        "Hello 👋! I am a tiny model in the format of ChatGLM2-6B. Nice to meet you. What would you like to know?",
    ),
    Exchange(
        ("你是谁", "你叫什么名字", "介绍一下你自己", "请介绍一下你自己", "自我介绍一下"),
        "我是一个很小的演示模型，文件格式与 ChatGLM2-6B 完全相同，但是只会说几句话。",
    ),
    Exchange(
        ("who are you", "what is your name", "what's your name", "introduce yourself", "please introduce yourself"),
        "I am a tiny demonstration model. My files look exactly like those of ChatGLM2-6B, "
        "but I know only a few sentences.",
    ),
    Exchange(
        ("你能做什么", "你会做什么", "你会什么", "你能帮我做什么", "你有什么功能"),
        "可以试试这些问题：\n\n- 讲个笑话\n- 背一首静夜思\n- 从一数到五\n- 用 Python 写 hello world\n- 什么是 BentoML",
    ),
    Exchange(
        ("what can you do", "what can I ask you", "help", "what do you know", "how can you help me"),
        "Try one of these:\n\n- Tell me a joke\n- Write a short poem\n- Count from 1 to 5\n"
        "- Write hello world in Python\n"
        "- What is BentoML",
    ),
    Exchange(("谢谢", "谢谢你", "多谢", "非常感谢", "谢谢你的帮助"), "不客气！😊 还有什么想聊的吗？"),
    Exchange(
        ("thanks", "thank you", "thank you very much", "thanks a lot", "thx"),
        "You are welcome! 😊 Is there anything else?",
    ),
    Exchange(("再见", "拜拜", "回头见", "下次见"), "再见！👋 祝你今天愉快。"),
    Exchange(("bye", "goodbye", "good bye", "bye bye", "see you", "see you later"), "Bye bye! 👋 Have a nice day."),
    Exchange(("早上好", "早安", "上午好"), "早上好！☀️ 新的一天开始了。"),
    Exchange(("good morning", "morning"), "Good morning! ☀️ A new day begins."),
    Exchange(("晚安", "我去睡觉了", "我要睡觉了"), "晚安！🌙 做个好梦。"),
    Exchange(("good night", "I am going to bed"), "Sleep well! 🌙"),
    Exchange(("你好吗", "你怎么样", "最近怎么样"), "挺好的，谢谢关心！你呢？"),
    Exchange(("how are you", "how are you today", "how do you do"), "Fine, thank you! And you?"),
    Exchange(
        ("什么是 BentoML", "什么是BentoML", "BentoML 是什么", "BentoML是什么", "介绍一下 BentoML", "介绍一下BentoML"),
        "BentoML 是一个开源的 Python 框架，用来把机器学习模型做成在线服务："
        "写一个服务类，打包成 Bento，再部署到任何机器上。",
    ),
    Exchange(
        ("what is BentoML", "what's BentoML", "tell me about BentoML", "explain BentoML"),
        "Build, ship, serve: BentoML is an open-source Python framework. "
        "Write a service class, build it into a Bento and deploy it anywhere.",
    ),
    Exchange(
        (
            "什么是 ChatGLM2",
            "什么是ChatGLM2",
            "ChatGLM2 是什么",
            "ChatGLM2是什么",
            "介绍一下 ChatGLM2",
            "什么是 ChatGLM2-6B",
            "ChatGLM2-6B 是什么",
            "ChatGLM2-6B是什么",
            "介绍一下 ChatGLM2-6B",
        ),
        "ChatGLM2-6B 是一个开源的中英双语对话模型，有六十亿个参数，上下文长度为 8192。",
    ),
    Exchange(
        (
            "what is ChatGLM2",
            "what is ChatGLM2-6B",
            "what's ChatGLM2",
            "what's ChatGLM2-6B",
            "tell me about ChatGLM2",
            "tell me about ChatGLM2-6B",
        ),
        "An open bilingual chat model: ChatGLM2-6B has six billion parameters and a context of 8192 tokens.",
    ),
    Exchange(("从一数到五", "从1数到5", "数到五", "请从一数到五"), "一、二、三、四、五。"),
    Exchange(
        ("count from 1 to 5", "count to 5", "count to five", "count from one to five", "please count from 1 to 5"),
        "1, 2, 3, 4, 5.",
    ),
    Exchange(
        ("一周有哪几天", "一个星期有哪几天", "一星期有哪几天", "一周有几天"),
        "七天：星期一、星期二、星期三、星期四、星期五、星期六、星期日。",
    ),
    Exchange(
        ("what are the days of the week", "name the days of the week", "list the days of the week", "days of the week"),
        "Seven days:\n\n1. Monday\n2. Tuesday\n3. Wednesday\n4. Thursday\n5. Friday\n6. Saturday\n7. Sunday",
    ),
    Exchange(
        ("讲个笑话", "讲一个笑话", "说个笑话", "给我讲个笑话", "请讲个笑话"),
        "程序员的妻子说：“去买一个西瓜，如果看到鸡蛋，就买十个。”程序员看到了鸡蛋，于是买回来十个西瓜。😂",
    ),
    Exchange(
        ("tell me a joke", "tell a joke", "say something funny", "do you know a joke", "make me laugh"),
        "Why do programmers mix up Halloween and Christmas? Because OCT 31 is DEC 25. 😂",
    ),
    Exchange(
        ("背一首静夜思", "背诵静夜思", "静夜思", "念一首静夜思", "背一首李白的静夜思", "写一首诗", "念一首诗"),
        "**静夜思**（唐·李白）\n\n床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。\n\n"
        "第一句写月光照在床前，第二句把月光比作地上的霜，第三句写诗人抬头看月亮，第四句写他低下头来，想念远方的家乡。"
        "全诗只有二十个字，没有一个难字，一千多年来人人会背。",
    ),
    Exchange(
        ("write a short poem", "write a poem", "write me a poem", "tell me a poem", "recite a poem"),
        "### The little model\n\nA handful of numbers, a sentence or two,\n"
        "I learned them by heart to say them to you.\n"
        "Ask me for more and I quietly say:\nthe big one will answer, just load it today.\n\n"
        "The first two lines tell what I am made of, the third what I do when I do not know, and the last one where "
        "to find my bigger brother.",
    ),
    Exchange(
        ("1+1=?", "1+1", "1 + 1 = ?", "1 + 1", "what is 1+1", "what is 1 + 1", "what's 1+1", "how much is 1+1"),
        "It is two: 1 + 1 = 2.",
    ),
    Exchange(("1+1等于几", "1加1等于几", "一加一等于几", "1+1等于多少", "1 + 1 等于几"), "等于二。"),
    Exchange(
        (
            "怎么导入真正的模型",
            "如何导入真正的模型",
            "怎么使用真正的模型",
            "怎样导入真正的模型",
            "怎么导入 ChatGLM2-6B",
            "如何导入 ChatGLM2-6B",
        ),
        f"下载 ChatGLM2-6B 的权重，运行：\n\n```bash\n{IMPORT_COMMAND}\n```\n\n"
        "然后设置 CHATGLM_MODEL=chatglm2-6b，重新启动服务。",
    ),
    Exchange(
        (
            "how do I import the real model",
            "how can I import the real model",
            "how do I use the real model",
            "how do I import ChatGLM2-6B",
            "how to import the real model",
            "import the real model",
        ),
        f"Download the weights of ChatGLM2-6B and run:\n\n```bash\n{IMPORT_COMMAND}\n```\n\n"
        "Then start the service again with CHATGLM_MODEL=chatglm2-6b.",
    ),
    Exchange(
        ("中国的首都是哪里", "中国的首都在哪里", "中国的首都是哪儿", "中国首都是哪里", "中国的首都是什么"),
        "北京是中国的首都。",
    ),
    Exchange(
        (
            "what is the capital of China",
            "what's the capital of China",
            "capital of China",
            "name the capital of China",
        ),
        "Beijing is the capital of China.",
    ),
    Exchange(
        (
            "用 Python 写 hello world",
            "用Python写hello world",
            "用 Python 写一个 hello world",
            "写一个 Python 的 hello world",
            "用 Python 写一个 Hello World 程序",
        ),
        f"下面是 Python 代码：\n\n{_HELLO_PYTHON}\n\n运行之后会显示 `Hello, world!`。",
    ),
    Exchange(
        (
            "write hello world in Python",
            "hello world in Python",
            "write a hello world program in Python",
            "Python hello world",
            "show me hello world in Python",
        ),
        f"Here is the program:\n\n{_HELLO_PYTHON}\n\nIt prints `Hello, world!`.",
    ),
    Exchange(
        ("一年有哪几个季节", "一年有几个季节", "一年四季是哪四季", "一年有哪些季节"),
        "四个季节：\n\n1. 春天 🌱\n2. 夏天 ☀️\n3. 秋天 🍂\n4. 冬天 ❄️",
    ),
    Exchange(
        ("what are the four seasons", "name the four seasons", "list the four seasons", "what are the seasons"),
        "Four seasons:\n\n| Season | Sign |\n|---|---|\n"
        "| Spring | 🌱 |\n| Summer | ☀️ |\n| Autumn | 🍂 |\n| Winter | ❄️ |",
    ),
    Exchange(("你会说英语吗", "你会英语吗", "你会说英文吗", "你会英文吗"), "会一点儿，请用英语和我说 hello。"),
    Exchange(("do you speak Chinese", "can you speak Chinese", "do you know Chinese"), "A little: 你好！"),
)

NAMES: tuple[str, ...] = ("小明", "小红", "Alice", "Bob")
_TELL_ZH = ("我叫{}", "你好，我叫{}")
_TELL_EN = ("my name is {}", "hello, my name is {}")
_ASK_ZH = ("我叫什么名字", "我叫什么")
_ASK_EN = ("what is my name", "what's my name")

HAN = re.compile(r"[\u3400-\u9fff]")
_TRAILING = " \t\r\n。.！!？?，,~～…=:：;；"


def normalise(question: str) -> str:
    """A question without its case, outer white space and closing punctuation, which the answer does not depend on."""
    return question.strip().rstrip(_TRAILING).lower()


KNOWN: dict[str, str] = {question: exchange.answer for exchange in EXCHANGES for question in exchange.questions}
_BY_NORMAL = {normalise(question): answer for question, answer in KNOWN.items()}
_TOLD = {normalise(template.format(name)): name for template in _TELL_ZH + _TELL_EN for name in NAMES}
_ASKED_ZH = frozenset(map(normalise, _ASK_ZH))
_ASKED_EN = frozenset(map(normalise, _ASK_EN))
TELL: tuple[str, ...] = tuple(template.format(name) for template in _TELL_ZH + _TELL_EN for name in NAMES)
ASK: tuple[str, ...] = _ASK_ZH + _ASK_EN


def _without_system(question: str) -> str:
    """The question after the longest known system message that it starts with."""
    for system in sorted(SYSTEMS, key=len, reverse=True):
        if question.startswith(system):
            return question[len(system) :]
    return question


def _told_name(history: Sequence[str]) -> str | None:
    """The name that the user told last."""
    for question in reversed(history):
        if (name := _TOLD.get(normalise(question))) is not None:
            return name
    return None


def answer_to(questions: Sequence[str]) -> str:
    """The answer to the last of a conversation's questions, which may begin with a system message.

    Depends on earlier questions only for the user's name.
    """
    *history, last = questions
    asked = normalise(_without_system(last))
    if asked in _BY_NORMAL:
        return _BY_NORMAL[asked]
    if (name := _TOLD.get(asked)) is not None:
        return f"记住了，{name}！" if HAN.search(asked.replace(name.lower(), "")) else f"Noted, {name}!"
    if asked in _ASKED_ZH:
        name = _told_name(history)
        return f"刚才你说你叫{name}。" if name else "还不知道你的名字，请告诉我。"
    if asked in _ASKED_EN:
        name = _told_name(history)
        return f"Your name is {name}." if name else "Tell me your name first."
    return FALLBACK_ZH if HAN.search(last) else FALLBACK_EN
