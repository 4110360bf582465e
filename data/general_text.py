"""Text that is no medical report and that anyone can make: the Python standard library, Chinese sentences by template.

It stands in for what a user's language model was pre-trained on: English prose, code, a few per cent of Chinese.
"""

from __future__ import annotations

import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Tests, tables of characters, and what some distributions of Python leave out.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "distutils"}
SKIPPED |= {"idlelib", "tkinter", "turtledemo", "ensurepip", "__pycache__"}
PARAGRAPH = (2, 7)  # sentences
KEPT = 0.5  # chance that a value of the paragraph is used again, as a text returns to what it is about
REPEATED = 0.4  # of the sentences are said once more: asked, quoted, summed up
NOTED = 0.5  # of the paragraphs are notes, and the sentences that were written from them

WORDS = {
    "who": "小明 李华 王老师 张先生 陈女士 刘师傅 奶奶 爷爷 哥哥 妹妹 弟弟 姐姐 邻居 同学 司机 店主 工程师 校长 "
    "农民 画家 记者 导游 木匠 厨师 编辑 警察 船长 工人 学生 客人 队长 表叔 舅舅 阿姨 周经理 赵先生 孙教练",
    "city": "北京 上海 南京 广州 西安 成都 杭州 武汉 青岛 苏州 桂林 昆明 沈阳 长沙 天津 重庆 厦门 大连 福州 兰州 "
    "济南 郑州 贵阳 海口 哈尔滨 拉萨 宁波 合肥 南昌 太原 银川 西宁",
    "spot": "公园 学校 车站 图书馆 博物馆 超市 操场 广场 码头 书店 山顶 村口 湖边 河岸 办公楼 仓库 花园 教室 工厂 "
    "机场 邮局 银行 饭店 茶馆 剧院 桥头 市场 体育馆 宿舍 院子 田野 森林 海滩 地铁口",
    "thing": "桌子 椅子 箱子 书包 杯子 雨伞 照片 地图 钥匙 电脑 手机 自行车 花瓶 沙发 毛巾 镜子 窗帘 闹钟 皮球 木板 "
    "铁盒 信封 帽子 手套 梯子 灯泡 相机 风筝 石块 积木 吉他 钢琴 眼镜 竹篮 绳子 画框 玻璃 邮票",
    "food": "苹果 香蕉 西瓜 葡萄 面条 米饭 饺子 豆腐 鸡蛋 牛奶 面包 白菜 土豆 辣椒 红枣 花生 蜂蜜 茶叶 咖啡 月饼 "
    "橘子 桃子 玉米 萝卜 黄瓜 番茄 鱼汤 包子 馒头 粽子",
    "animal": "小猫 小狗 白马 山羊 水牛 兔子 松鼠 燕子 麻雀 鸽子 金鱼 乌龟 熊猫 老虎 大象 猴子 蝴蝶 蜜蜂 青蛙 孔雀",
    "plant": "柳树 松树 桃花 菊花 竹子 荷花 梅花 银杏 枫树 杨树 玫瑰 茉莉 小麦 水稻 向日葵 牡丹 桂花 葡萄藤",
    "color": "红色 白色 黑色 蓝色 绿色 黄色 灰色 紫色 棕色 金色 银色 粉色 淡青色 深褐色",
    "side": "左 右",
    "level": "上 中 下",
    "way": "东 西 南 北 东南 西北 东北 西南",
    "near": "前面 后面 旁边 里面 外面 对面 中间 附近 上方 下方 两侧 周围 边缘 底部 顶部 内部 角落",
    "sky": "晴 多云 阴 小雨 大雨 雷阵雨 小雪 大雾 大风 转晴 有霜",
    "season": "春天 夏天 秋天 冬天 年初 年底 月初 周末 清明 端午 中秋 暑假 寒假",
    "hour": "清晨 早上 上午 中午 下午 傍晚 晚上 深夜",
    "feel": "高兴 难过 惊讶 平静 着急 满意 失望 兴奋 疲倦 自豪 好奇 担心 感动 轻松",
    "look": "宽大 狭小 整齐 光滑 粗糙 明亮 清楚 模糊 均匀 干净 破旧 崭新 厚实 单薄 锐利 柔软 坚硬 规则 密集 稀疏",
    "doing": "看书 跑步 唱歌 画画 游泳 下棋 散步 拍照 写信 做饭 种花 钓鱼 跳舞 骑车 打球 爬山 放风筝 修理机器 学习外语",
    "subject": "语文 数学 历史 地理 物理 化学 音乐 美术 英语 体育 生物 编程 哲学 经济",
    "work": "小说 诗集 电影 纪录片 话剧 曲子 论文 游记 画册 剧本 词典 童话 杂志",
    "job": "修路 建桥 种树 排练 装修 调查 翻译 设计 采访 搬家 打扫 测量 记录 投票 登记 包装 运输 验收",
    "stuff": "木头 钢铁 塑料 纸张 石头 棉布 陶土 铝板 橡胶 水泥 丝绸 皮革 竹片 沙子",
    "event": "比赛 会议 婚礼 展览 讲座 晚会 考试 庙会 音乐会 运动会 开幕式 毕业典礼",
    "rel": "因为 虽然 如果 只要 即使 既然",
    "degree": "非常 十分 比较 有点 相当 特别 稍微 几乎 完全 基本",
}  # fmt: skip
SENTENCES = (
    "{city}今天{sky}，气温{n}到{n}度，{way}风{d}级",
    "{season}的{hour}，{spot}里的{plant}开了，{n}位游客前来参观",
    "{who}在{spot}{near}看见一只{animal}，长约{n}cm",
    "{who}说：“{thing}放在{side}边的柜子里，从{level}层数第{d}个”",
    "这块{stuff}厚{n}mm，宽{n}cm，长{n}米，表面{look}",
    "从{city}到{city}有{n}公里，坐火车要{d}小时{n}分钟",
    "{hour}{d}点{n}分，{who}到达{spot}，感到{degree}{feel}",
    "{thing}的价格是{n}元，比去年降了{d}元",
    "{who}喜欢{doing}，每天{hour}都要练{n}分钟",
    "{side}边是{color}的{thing}，{side}边是{color}的{thing}",
    "请先向{side}转，走{n}米，再向{way}走，{spot}就在{near}",
    "{who}买了{d}斤{food}和{n}个{food}，一共花了{n}元",
    "做{food}时，先加{n}克水，再煮{d}分钟，最后放少许盐",
    "{event}于{m}月{n}日在{city}的{spot}举行，共有{n}人参加",
    "{subject}课上，{who}提出了{d}个问题，大家讨论了{n}分钟",
    "这部{work}共{n}章，第{d}章写的是{who}在{city}的生活",
    "{plant}高约{n}cm，叶子{look}，{season}时呈{color}",
    "{animal}从{spot}的{side}侧跑到{near}，大约用了{n}秒",
    "{rel}{who}来晚了，{event}还是在{hour}{d}点开始",
    "{spot}的{level}层有{n}个房间，其中{d}个朝{way}",
    "{year}年，{who}搬到{city}，在那里住了{d}年",
    "{who}把{thing}搬到{spot}的{side}{level}角，离门约{n}cm",
    "电梯停在第{n}层，{who}从{side}侧的门走了出来",
    "{color}的{thing}上有一条{n}mm长的细缝，边缘{look}",
    "{job}的工作已经完成{n}%，预计{m}月{n}日结束",
    "{who}量了量，{thing}的直径为{n}mm，重{n}克",
    "图中{side}{level}方的小点代表{spot}，线段长{n}mm",
    "{city}位于{way}部，人口约{n}万，面积{n}平方公里",
    "没有人知道{who}为什么在{hour}离开{spot}",
    "{who}和{who}都认为，这个结果{degree}合理，不需要改动",
    "河面宽{n}米，水深约{d}米，{side}岸可以看到{plant}",
    "如果明天{sky}，我们就去{spot}{doing}；否则在家{doing}",
    "墙上挂着{d}幅画，最大的一幅宽{n}cm，位于正{level}方",
    "本店{hour}{d}点开门，{season}期间照常营业，请提前{n}分钟到",
    "比分是{n}比{n}，{who}在第{n}分钟从{side}路进球",
    "{who}的{thing}不见了，找了{n}分钟，原来就在{thing}{near}",
    "第{d}排{side}起第{n}个座位是{who}的",
    "实验表明，温度升高{d}度，{stuff}的长度增加{n}mm",
    "{food}{n}克，{food}{n}克，混合后分成{d}份",
    "站在{spot}往{way}看，可见一座{n}米高的塔，形状{look}",
    "{who}去年{m}月开始学{subject}，现在已经能{doing}了",
    "{thing}由{stuff}制成，内有{d}层，外面涂成{color}",
    "他们沿着{side}侧的小路走了{d}小时，未见一个人",
    "这本{work}的作者生于{year}年，一生写了{n}部作品",
    "{animal}一般长{n}cm左右，多在{season}出现，常见于{spot}{near}",
    "注意：{thing}应放在{level}层，距离{side}墙不小于{n}cm",
    "总的来说，{event}{degree}成功，{who}{degree}{feel}",
    "{who}问：“{spot}在哪里？”{who}答：“在{way}边，走{n}分钟就到”",
    "{m}月以来，{city}共下了{d}场雨，雨量约{n}mm",
    "两条线在{level}部相交，夹角{n}度，{side}边的一条较长",
    "{who}建议每{d}个月检修一次{thing}，以免出现问题",
    "门票{n}元，学生半价，{d}岁以下儿童免费",
    "屋里{look}，只有{side}边放着一张{color}的{thing}",
    "经过{d}次试验，{who}终于做出了{look}的{thing}",
    "{job}需要{n}天，{d}个人轮流，预算{n}元",
    "{hour}的{spot}{degree}安静，{animal}停在{plant}的{level}部",
    "信上写着：{year}年{m}月{d}日，{city}，{sky}，一切正常",
    "{thing}{near}散落着{n}块大小不等的{stuff}，最大的约{n}mm",
    "{who}认为{subject}比{subject}难，可能与老师的讲法有关",
    "新的{spot}分为{level}、{level}两部分，{side}区对外开放",
    "按照计划，{who}负责{job}，{who}负责{job}，{n}天后再来查看",
    "一年后再去{city}，{spot}的变化{degree}明显",
)

REPETITIONS = (
    "{who}问：“{said}，对吗？”{who}答：“对，{said}。”",
    "{who}在信里写道：{said}。",
    "也就是说，{said}。",
    "标题：{said}。正文：{said}。",
    "{who}又说了一遍：“{said}。”",
    "总之，{said}。",
)

NOTES = (
    ("{city}{sky}{n}度", "今天{city}{sky}，气温约{n}度"),
    ("{side}边{level}层{thing}{n}个", "{level}层的{side}边放着{thing}，共有{n}个"),
    ("{side}侧{spot}{animal}{n}cm", "在{spot}的{side}侧看见{animal}，长约{n}cm"),
    ("{color}{plant}{n}cm", "{plant}高约{n}cm，叶子呈{color}"),
    ("{who}{doing}{n}分钟", "{n}分钟里，{who}一直在{doing}"),
    ("{food}{n}元", "{who}花了{n}元，买的是{food}"),
    ("{event}{m}月{n}日", "{m}月{n}日将举行{event}"),
    ("{side}{level}方{stuff}{n}mm", "位于{side}{level}方的{stuff}厚约{n}mm"),
    ("{way}边{spot}{n}米", "向{way}走{n}米，可见{spot}"),
    ("{color}{thing}{n}mm", "{thing}的直径约{n}mm，涂成{color}"),
    ("{who}{subject}{n}分", "{subject}考试，{who}得了{n}分"),
    ("{level}部{way}侧{plant}{n}棵", "{plant}有{n}棵，种在{way}侧的{level}部"),
    ("{job}{n}人{d}天", "{n}个人要用{d}天完成{job}"),
    ("{hour}{d}点{spot}{who}", "{who}{hour}{d}点在{spot}等候"),
    ("{look}{stuff}{n}克", "取{n}克{stuff}，表面{look}"),
    ("{side}岸{spot}{d}处", "{spot}共{d}处，都在{side}岸"),
)


def python_files() -> Iterator[str]:
    """The source of the running Python's standard library, file by file in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            with tokenize.open(path) as stream:  # in the encoding that the file declares
                yield stream.read()


class ChineseParagraphs:
    """Paragraphs of everyday sentences, without end; equal seeds give equal text."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.words = {slot: words.split() for slot, words in WORDS.items()}

    def _value(self, slot: str) -> str:
        rng = self.rng
        if slot in self.words:
            return rng.choice(self.words[slot])
        low, high = {"n": (1, rng.choice((9, 60, 100, 300))), "d": (1, 12), "m": (1, 12), "year": (1800, 2030)}[slot]
        return str(rng.randint(low, high))

    def draw(self) -> str:
        """A paragraph."""
        return (self._notes() if self.rng.random() < NOTED else self._story()) + "\n"

    def _fill(self, template: str, used: dict[str, str], kept: float) -> str:
        """The template with its slots filled, each by the value in ``used`` with the chance ``kept``."""

        def value(match: re.Match[str]) -> str:
            slot = match[1]
            if slot not in used or self.rng.random() > kept:
                used[slot] = self._value(slot)
            return used[slot]

        return re.sub(r"{(\w+)}", value, template)

    def _notes(self) -> str:
        """Some notes, and for each the sentence that was written from it."""
        pairs: list[tuple[str, str]] = []
        for note, sentence in self.rng.sample(NOTES, self.rng.randint(1, 3)):
            used: dict[str, str] = {}
            pairs.append((self._fill(note, used, 1.0), self._fill(sentence, used, 1.0)))
        head = self.rng.choice(("备忘：", "要点：", "记录：", "提纲："))
        return head + "；".join(note for note, _ in pairs) + "。" + "".join(text + "。" for _, text in pairs)

    def _story(self) -> str:
        """Sentences that come back to their people, places and numbers, and to each other."""
        used: dict[str, str] = {}
        said: list[str] = []
        text = ""
        for sentence in self.rng.choices(SENTENCES, k=self.rng.randint(*PARAGRAPH)):
            said.append(self._fill(sentence, used, KEPT))
            text += said[-1] + "。"
            if self.rng.random() < REPEATED:
                repetition = self.rng.choice(REPETITIONS).replace("{said}", self.rng.choice(said))
                text += self._fill(repetition, used, KEPT)
        return text
