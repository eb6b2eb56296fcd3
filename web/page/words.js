// The page's texts in English and Chinese.

const WORDS = {
  en: {
    apiDocs: "API",
    answer: "Answer",
    cancel: "Cancel",
    close: "Close",
    code: "code",
    conversations: "Conversations",
    copied: "Copied",
    copy: "Copy",
    defaults: "Back to the defaults",
    deleted: "“{title}” was deleted.",
    done: "Done",
    edit: "Edit and resend",
    hint: "Enter sends · Shift+Enter new line · Esc stops · ↑ edits the last question",
    keyAsked: "This server asks for an API key.",
    keyForget: "Forget the API key",
    keyKeep: "Remember it on this device",
    keyUse: "Use this key",
    languageOther: "中文",
    lengthReached: "The answer ended at the limit of {n} tokens; raise it in the settings.",
    maxTokens: "Longest answer (max_tokens)",
    maxTokensHint: "In tokens; the default is 2048.",
    model: "Model",
    newChat: "New chat",
    placeholder: "Ask something",
    regenerate: "Regenerate",
    remove: "Delete “{title}”",
    retry: "Try again",
    send: "Send",
    sendEdited: "Send",
    settings: "Settings",
    skip: "To the question",
    speed: "{speed} tokens/s",
    stop: "Stop",
    stopped: "Stopped",
    storageFull: "The browser's storage is full: what comes now is lost on reload. Delete some conversations.",
    system: "System prompt",
    systemHint: "What the model should know before the first question",
    temperature: "Temperature",
    temperatureHint: "0 always takes the likeliest word; the default is 0.95.",
    theme_auto: "Theme: system",
    theme_dark: "Theme: dark",
    theme_light: "Theme: light",
    thinking: "The answer is on its way",
    toEnd: "To the end",
    tokens: "{prompt} → {completion} tokens",
    topP: "Top-p",
    topPHint: "Share of the likeliest words to choose from; the default is 0.7.",
    undo: "Undo",
    untitled: "New chat",
    wait: "first token after {seconds} s",
    welcome: "What would you like to know?",
    welcomeHint: "Conversations stay in this browser and are sent to this server only.",
    suggestions: ["hello", "write hello world in Python", "what are the four seasons", "write a short poem"],
    errors: {
      context_length_exceeded: "The conversation has grown too long for the model. Start a new one, or edit an earlier question.",
      invalid_api_key: "The API key is missing or wrong.",
      model_loading: "The model is still being loaded. Try again in a moment.",
      model_load_failed: "The model could not be loaded; the server's log says why.",
      model_not_found: "The server does not have this model; choose another in the settings.",
      rate_limit_exceeded: "The server has too much to do right now. Try again in {seconds} s.",
      refused: "The server refused the request: {message}",
      server: "The server failed while answering. What was written so far is kept.",
      shutting_down: "The server is shutting down. Try again in a moment.",
      cut: "The connection broke before the answer was complete. What was written so far is kept.",
      unreachable: "The server cannot be reached. Is it running, and are you online?",
      keyWrong: "The server does not accept this key.",
    },
  },
  zh: {
    apiDocs: "接口文档",
    answer: "回答",
    cancel: "取消",
    close: "关闭",
    code: "代码",
    conversations: "对话列表",
    copied: "已复制",
    copy: "复制",
    defaults: "恢复默认值",
    deleted: "已删除“{title}”。",
    done: "完成",
    edit: "修改并重新发送",
    hint: "Enter 发送 · Shift+Enter 换行 · Esc 停止 · ↑ 修改上一个问题",
    keyAsked: "此服务需要 API 密钥。",
    keyForget: "忘记 API 密钥",
    keyKeep: "在此设备上记住",
    keyUse: "使用此密钥",
    languageOther: "English",
    lengthReached: "回答已达到 {n} 个 token 的上限，可在设置中调高。",
    maxTokens: "回答的最大长度 (max_tokens)",
    maxTokensHint: "以 token 计，默认 2048。",
    model: "模型",
    newChat: "新对话",
    placeholder: "输入问题",
    regenerate: "重新生成",
    remove: "删除“{title}”",
    retry: "重试",
    send: "发送",
    sendEdited: "发送",
    settings: "设置",
    skip: "跳到输入框",
    speed: "{speed} token/秒",
    stop: "停止",
    stopped: "已停止",
    storageFull: "浏览器存储空间已满：之后的内容刷新后会丢失。请删除一些对话。",
    system: "系统提示词",
    systemHint: "在第一个问题之前告诉模型的话",
    temperature: "温度 (temperature)",
    temperatureHint: "0 总是选最可能的词，默认 0.95。",
    theme_auto: "主题：系统",
    theme_dark: "主题：深色",
    theme_light: "主题：浅色",
    thinking: "正在等待回答",
    toEnd: "到底部",
    tokens: "{prompt} → {completion} token",
    topP: "Top-p",
    topPHint: "只在累计概率达到此值的词中选择，默认 0.7。",
    undo: "撤销",
    untitled: "新对话",
    wait: "首字 {seconds} 秒",
    welcome: "有什么想问的？",
    welcomeHint: "对话保存在此浏览器中，只发送到此服务。",
    suggestions: ["你好", "用 Python 写 hello world", "一年有哪几个季节", "背一首静夜思"],
    errors: {
      context_length_exceeded: "对话太长，超出了模型的上下文长度。请新建对话，或修改前面的问题。",
      invalid_api_key: "API 密钥缺失或不正确。",
      model_loading: "模型正在加载，请稍后重试。",
      model_load_failed: "模型加载失败，原因请看服务日志。",
      model_not_found: "服务上没有这个模型，请在设置中另选一个。",
      rate_limit_exceeded: "服务繁忙，请 {seconds} 秒后重试。",
      refused: "服务拒绝了请求：{message}",
      server: "服务在回答时出错，已写出的内容会保留。",
      shutting_down: "服务正在关闭，请稍后重试。",
      cut: "回答尚未完成，连接就断开了，已写出的内容会保留。",
      unreachable: "无法连接服务。服务在运行吗？网络正常吗？",
      keyWrong: "服务不接受此密钥。",
    },
  },
};

let language = "en";

/** "zh" for any Chinese, "en" for everything else. */
export function preferredLanguage(tags) {
  return tags.length && tags[0].toLowerCase().startsWith("zh") ? "zh" : "en";
}

export function setLanguage(name) {
  language = name in WORDS ? name : "en";
}

export function currentLanguage() {
  return language;
}

/** The words for a key, e.g. `say("tokens", { prompt: 17, completion: 29 })`; lists come back as lists. */
export function say(key, values = {}) {
  return fill(WORDS[language][key], values);
}

/** A sentence for a person about a failure: { kind, message, seconds }. */
export function sayFailure(failure) {
  const sentences = WORDS[language].errors;
  return fill(sentences[failure.kind] ?? sentences.refused, { seconds: 5, message: "", ...failure });
}

function fill(words, values) {
  if (typeof words !== "string") return words;
  return words.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}
