"""Plain word lists that unknown questions are put together from: one for training, another, disjoint, for checking."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The material of a question generator: words, single characters, sentence patterns and code point ranges."""

    zh: tuple[str, ...]
    en: tuple[str, ...]
    zh_patterns: tuple[str, ...]  # {} is replaced by words
    en_patterns: tuple[str, ...]
    characters: str
    scripts: tuple[tuple[int, int], ...]  # first and last code point


_ZH = """
天气 今天 明天 昨天 早上 晚上 中午 春天 夏天 秋天 冬天 太阳 月亮 星星 地球 世界 国家 城市 北京 上海 广州 深圳 杭州
南京 日本 美国 法国 德国 英国 韩国 俄罗斯 印度 首都 人口 面积 历史 文化 语言 中文 英文 英语 日语 法语 音乐 电影
小说 诗 故事 笑话 作文 文章 标题 摘要 翻译 总结 解释 分析 比较 设计 计算 证明 程序 代码 函数 变量 算法 排序 数据
数据库 网络 模型 训练 推理 机器 学习 深度 人工智能 助理 机器人 电脑 手机 软件 硬件 系统 服务 接口 文件 目录 命令
参数 结果 错误 问题 答案 方法 原因 作用 意思 区别 关系 优点 缺点 特点 步骤 计划 目标 时间 地点 人物 事件 工作 学习
生活 家庭 朋友 孩子 父母 老师 学生 医生 护士 律师 司机 厨师 作家 歌手 画家 科学家 工程师 老板 同事 客户 用户 公司
学校 医院 银行 商店 饭店 车站 机场 公园 图书馆 房子 房间 厨房 桌子 椅子 窗户 门 床 灯 书 笔 纸 衣服 鞋子 帽子 手表
眼镜 苹果 香蕉 西瓜 葡萄 米饭 面条 饺子 鸡蛋 牛奶 咖啡 茶 水 酒 糖 盐 油 猫 狗 鸟 鱼 马 牛 羊 猪 老虎 熊猫 大象
猴子 花 草 树 山 河 海 湖 云 雨 雪 风 火 红色 蓝色 绿色 黄色 黑色 白色 大 小 多 少 高 低 长 短 快 慢 新 旧 好 坏
冷 热 美丽 聪明 重要 简单 复杂 有趣 便宜 贵 喜欢 讨厌 知道 认识 觉得 希望 需要 应该 可以 能够 开始 结束 打开 关闭
使用 制作 购买 出售 学会 忘记 记得 帮助 告诉 回答 写 读 听 说 看 走 跑 跳 吃 喝 睡 玩 唱 画 买 卖 做 想 找 给 用
一 二 三 四 五 六 七 八 九 十 百 千 万 我 你 他 她 它 我们 你们 他们 这 那 什么 谁 哪里 怎么 为什么 多少 几 吗 呢
吧 的 了 是 在 有 和 也 不 很 都 就 还 要 会 能 请 把 被 让 名字 自己 介绍 星期 季节 月份 节日 生日 礼物 旅游 运动
足球 篮球 游泳 健康 感冒 药 钱 价格 经济 法律 政治 宗教 哲学 数学 物理 化学 生物 地理 宇宙 能量 速度 温度 重量
李白 杜甫 唐诗 宋词 孔子 静 夜 思 模型权重 导入 下载 安装 部署 启动 容器
"""

_EN = """
weather today tomorrow yesterday morning evening night spring summer autumn winter sun moon star earth world
country city paris london tokyo berlin rome france japan germany italy spain india russia america capital
population area history culture language chinese english french music movie novel poem story joke essay article
title summary translate explain analyse compare design compute prove program code function variable algorithm sort
data database network model training inference machine learning deep intelligence assistant robot computer phone
software hardware system service interface file folder command parameter result error question answer method
reason purpose meaning difference relation step plan goal time place person event work study life family friend
child parent teacher student doctor nurse lawyer driver cook writer singer painter scientist engineer boss client
user company school hospital bank shop restaurant station airport park library house room kitchen table chair
window door bed lamp book pen paper clothes shoes hat watch glasses apple banana grape rice noodle egg milk coffee
tea water wine sugar salt oil cat dog bird fish horse cow sheep pig tiger panda elephant monkey flower grass tree
mountain river sea lake cloud rain snow wind fire red blue green yellow black white big small many few high low
long short fast slow new old good bad cold hot beautiful clever important simple complex funny cheap expensive
like hate know think feel hope need should can could begin end open close use make buy sell learn forget remember
help tell say write read hear speak see walk run jump eat drink sleep play sing draw do want find give show list
name count describe create build deploy serve import export load save delete update install start stop real the a
an of in on at to from with without for by and or not is are was were be been have has had does did will would may
might must this that these those it its he she they we you i me my your his her their our what who where when why
how which one two three four five six seven eight nine ten hundred python java rust javascript json html css sql
http api server client docker kubernetes linux windows week day month year season birthday gift travel sport
football health money price law physics chemistry biology hello hi thanks bye please sorry yes no ok
"""

# Common characters, most frequent first; order is of no importance.
_CHARACTERS = (
    "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会那后能对着事其里所去行过"
    "家十用发天如然作方成者多日都三小军二无同么经法当起与好看学进种将还分此心前面又定见只主没公从今回很己最但现前"
    "些所同手意理十实知月进想间样想问已本开才力头文话使相长几政全表被社正各明何场身先并真重部美海望口二情名门力教"
    "员体制比利己常难名工数通老新山应安命期系统量长西高向东南北什打做两次给或走任入眼世性车听它平路马由特接少处女"
    "叫品加放风每告件条四五六七八九百千万住信应电车房活书光气火水木金土花草树林石田星河江湖雨雪云春夏秋冬红黄蓝绿"
    "白黑快慢早晚午夜吃喝茶酒饭菜鱼肉米面油盐糖果瓜牛羊鸡狗猫虎龙鸟虫父母兄弟姐妹爷奶男孩儿朋友师医院校店市场机器"
    "学习网络算法数据模型服务程序代码编写运行测试错误结果输入输出文件目录参数权限用户密码登录注册邮箱电话地址号码"
    "身份证件银行卡钱包价格便宜贵买卖商品订单支付退货快递物流仓库供应链管理销售市场营销广告品牌设计图片视频音乐电"
    "影游戏小说诗歌散文历史哲学宗教艺术科技物理化学生物地理天文宇宙能源环境气候变化污染保护森林海洋沙漠草原城乡建"
    "筑道路桥梁隧道铁飞船舶汽自摩托足篮排球跑步游泳健康疾病治疗药品手术护士律师警察消防司法院检察官政府议会选举投"
    "票民族自由平等博爱战争和平安全危险灾难地震洪水台爱恨喜怒哀乐悲欢离合聪明愚蠢勇敢懦弱善良邪恶美丽丑陋干净脏乱"
    "整齐简单复杂容易困难轻松紧张忙闲穷富强弱胖瘦高矮粗细厚薄深浅冷热干湿软硬尖钝锋利光滑"
)

_ZH_PATTERNS = (
    "{}是什么",
    "什么是{}",
    "{}怎么做",
    "怎么{}",
    "如何{}",
    "为什么{}",
    "请{}",
    "帮我{}一下",
    "请问{}在哪里",
    "{}的{}是什么",
    "{}和{}有什么区别",
    "写一篇关于{}的文章",
    "写一首关于{}的诗",
    "讲一个{}的故事",
    "介绍一下{}",
    "{}有几个{}",
    "我想{}",
    "我喜欢{}",
    "你喜欢{}吗",
    "你会{}吗",
    "{}，{}",
    "{}。{}。",
    "{}等于几",
    "用{}写{}",
    "把{}翻译成{}",
    "{}多少钱",
    "哪里有{}",
    "{}的首都是哪里",
    "背一首{}",
    "从{}数到{}",
    "一{}有几个{}",
    "给我{}",
    "{}是谁",
    "你是{}吗",
    "我叫{}",
    "我是{}",
    "总结一下：{}，{}。{}。",
    "{}！{}！",
    "请用{}回答{}",
    "你能{}吗",
    "{}好",
    "你好{}",
    "谢谢{}",
    "再见{}",
)
_EN_PATTERNS = (
    "what is {}",
    "what is the {} of {}",
    "what are {}",
    "who is {}",
    "where is {}",
    "why is {} {}",
    "how do I {} the {}",
    "how to {} {}",
    "how many {} are there in {}",
    "tell me about {}",
    "tell me a {}",
    "write a {} about {}",
    "write {} in {}",
    "explain {}",
    "can you {} {}",
    "do you {} {}",
    "please {} the {}",
    "I {} {}",
    "I am {}",
    "my {} is {}",
    "the {} is {}",
    "{} {} {}",
    "{} and {}",
    "{}, {}, {}",
    "count {} to {}",
    "name the {} of {}",
    "list {}",
    "{}",
    "translate {} into {}",
    "what is {} + {}",
    "hello {}",
    "hi {}",
    "thank {}",
    "good {}",
    "{}?",
    "is {} {}",
    "are you {}",
    "You are a {} {}. {}",
    "import the {}",
    "how are {}",
    "call {}",
    "show me {} in {}",
    "say {}",
)
_SCRIPTS = (
    (0x21, 0x7E),
    (0xA1, 0xFF),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x5D0, 0x5EA),
    (0x621, 0x64A),
    (0x905, 0x939),
    (0xE01, 0xE3A),
    (0x3042, 0x3093),
    (0x30A2, 0x30F3),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1F64F),
    (0x2190, 0x22FF),
    (0x4E00, 0x9FA5),
    (0x3001, 0x3011),
    (0xFF01, 0xFF5E),
    (0x1F680, 0x1F6C5),
)

TRAINING = Words(
    zh=tuple(_ZH.split()),
    en=tuple(_EN.split()),
    zh_patterns=_ZH_PATTERNS,
    en_patterns=_EN_PATTERNS,
    characters="".join(dict.fromkeys(_CHARACTERS)),
    scripts=_SCRIPTS,
)

_HELD_OUT_ZH = """
量子 纠缠 黑洞 望远镜 显微镜 博物馆 展览 门票 地铁 高铁 航班 签证 护照 酒店 民宿 火锅 烧烤 豆腐 辣椒 生姜 大蒜
面包 蛋糕 冰淇淋 巧克力 榴莲 草莓 柠檬 长城 故宫 黄河 长江 泰山 西藏 新疆 云南 四川 重庆 成都 西安 武汉 冰岛 挪威
巴西 埃及 肯尼亚 股票 基金 保险 贷款 房租 工资 税收 合同 面试 简历 辞职 加班 会议 报告 幻灯片 表格 邮件 密码
路由器 键盘 鼠标 屏幕 电池 编译器 指针 线程 递归 二叉树 哈希 正则表达式 微积分 矩阵 概率 三角形 圆周率 素数 恐龙
化石 火山 地震 台风 彩虹 北极熊 企鹅 鲸鱼 蝴蝶 蜜蜂 钢琴 吉他 小提琴 京剧 书法 围棋 象棋 麻将 红楼梦 西游记 三国
鲁迅 苏轼 秦始皇 牛顿 爱因斯坦 失眠 头疼 咳嗽 疫苗 瑜伽 马拉松 羽毛球 乒乓球 滑雪 婚礼 离婚 搬家 装修 宠物 园艺
摄影
"""
_HELD_OUT_EN = """
quantum gravity telescope museum ticket subway visa passport hotel barbecue pepper garlic bread cake chocolate
mango strawberry lemon canyon desert iceland norway brazil egypt kenya nairobi stock fund insurance loan salary
tax contract interview resume meeting slide spreadsheet email router keyboard mouse screen battery compiler
pointer thread recursion binary regex calculus matrix probability triangle prime dinosaur fossil volcano
earthquake rainbow penguin whale butterfly piano guitar violin opera chess newton einstein shakespeare insomnia
headache vaccine yoga marathon tennis skiing wedding furniture gardening photography blockchain inflation
democracy philosophy architecture telescope vegetable carpenter astronaut submarine quickly perhaps therefore
meanwhile repair measure negotiate investigate celebrate borrow imagine
"""

HELD_OUT = Words(
    zh=tuple(_HELD_OUT_ZH.split()),
    en=tuple(_HELD_OUT_EN.split()),
    zh_patterns=(
        "我最近总是{}，应该怎么办",
        "{}和{}哪个更好",
        "推荐几个适合{}的{}",
        "{}是怎么形成的",
        "能不能详细说说{}",
        "{}为什么会{}",
        "请列出关于{}的三个要点",
        "{}需要准备哪些{}",
        "假设{}突然消失，{}会怎样",
        "给{}写一封关于{}的信",
        "{}最早出现在什么时候",
        "我想去{}，需要{}吗",
        "帮我检查这句话：{}不是{}",
    ),
    en_patterns=(
        "could you recommend a good {} near {}",
        "which is better, {} or {}",
        "give me three facts on {}",
        "my {} stopped working after the {}",
        "when was {} invented",
        "imagine {} without {}",
        "compare {} with {} briefly",
        "is there any link between {} and {}",
        "draft an email on {} to the {}",
        "{} versus {}: pros and cons",
        "should I {} before {}",
        "the {} was near the {}, wasn't it",
    ),
    characters=(
        "藏疆煎焙瓷帆蝶鲸鹅琴弈矿铜铝镍钛蔬梨桃杏枣梅兰菊竹松柏杨柳枫槐榆麦稻粟黍豆芝麻葵棉蚕丝绸缎绢纱绣锦袍衫裙裤袜靴"
    ),
    scripts=(
        (0x100, 0x17F),
        (0x400, 0x45F),
        (0x531, 0x556),
        (0x620, 0x66A),
        (0x985, 0x9B9),
        (0x10A0, 0x10C5),
        (0x1780, 0x17A2),
        (0x3041, 0x30FF),
        (0xAC00, 0xB000),
        (0x1F900, 0x1F9FF),
        (0x2200, 0x23FF),
        (0x3400, 0x4DB5),
        (0x1D400, 0x1D4FF),
    ),
)
