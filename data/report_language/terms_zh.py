"""Chinese words of the report labeller; kinds and values as in :mod:`data.report_language.terms`."""

from __future__ import annotations

import re

from data.report_language.lexer import Rule
from data.report_language.terms import LARGEST, NUMBER, ONE_SIZE, SIZE, SIZE_RULE, UNIT, Language, long_size_of

_LEVEL = {"上": "upper", "中": "middle", "下": "lower"}
_SIDE = {"左": "left", "右": "right", "双": "bilateral", "两": "bilateral"}
_DIGITS = {word: number for number, word in enumerate("一二三四五六七八九十", 1)} | {"两": 2}
_SHADOW = r"(?:(?:的)?(?:稍)?(?:高密度|密度增高|低密度|模糊|淡薄|淡|软组织密度|软组织|致密|密度))*(?:影|灶)"
_COMPARED = r"较(?:前|旧|既往|上次|原|老|20\d\d|本院)[^,。;、]{0,14}?"
_CHANGED = r"(?:增大|缩小|增多|减少|进展)"
_DEGREE = r"(?:明显|略|稍|有所|部分|大部分|大部|基本|逐渐|显著|轻度|轻微)*"


def _side(match: re.Match[str]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    both = "左" in match.group() and "右" in match.group()
    return ("bilateral" if both else _SIDE[match.group()[0]]), (), ()


def _levels(match: re.Match[str]) -> tuple[None, tuple[str, ...], tuple[str, ...]]:
    levels = tuple(_LEVEL[c] for c in match.group() if c in _LEVEL)
    return (None, levels, ()) if match.group().endswith("叶") else (None, (), levels)


def _count(match: re.Match[str]) -> int:
    word = match.group(1)
    return int(word) if word.isdigit() else _DIGITS[word]


def _terms(name: str | tuple[str, ...], *patterns: str) -> list[Rule]:
    names = (name,) if isinstance(name, str) else name
    return [Rule("term", names, pattern) for pattern in patterns]


_SKIPPED = (
    r"结节病|结节性硬化|结节[状样](?=增厚|突起|强化|改变|实变)|空洞脑|粟粒疹",
    r"纤维(?:支气管镜|镜|素|蛋白|腺瘤|瘤)|支气管(?:镜|充气征|气相|播散|动脉)",
    r"(?:皮下|纵隔|软组织)气肿|气肿疱|渗出性",
    r"不(?:均匀|规则|光整|光滑|清楚?|对称)",
    r"无名(?:动|静)脉|无特殊|无殊|无症状|无需|无壁|无痛|无回声|有无",
    r"(?:结节|肿[块物]|占位|癌)(?:楔形)?(?:切除)?术后(?:改变|状态|复查)?",
    r"非(?:钙化|空洞)性?|[左右]侧?(?:锁骨下|颈总)|胸导管|乳腺?导管|动脉导管|金属伪影",
    rf"(?:层厚|层距|层间距|间隔|壁厚|壁厚度|距[^,。;、]{{0,8}}?)(?:约|为|约为)?(?:{ONE_SIZE})",
    rf"(?:原|前片|前次|上次|既往|先前|旧片)(?:为|约|约为|大小|直径|大小约|直径约|"
    rf"最大径约)*(?:{NUMBER}×)?(?:{ONE_SIZE})",
    rf"(?:由|从)(?:原|原来|原先|前片|前次)?的?约?(?:{NUMBER}×)?{NUMBER}\s*(?:{UNIT})?(?=[^,。;]{{0,8}}?(?:至|到|为))",
    r"[一二两三四五六七八九十\d]+个月",
)

_FINDINGS = (
    *_terms("nodule", r"(?:小|微小|微)?结节(?:[状样]?(?:(?:软组织|高)?密度)?(?:增高)?影|灶|[状样]灶)?"),
    *_terms("nodule", rf"结节[状样]{_SHADOW}", r"肺内?小?结节"),
    *_terms(("calcification", "nodule"), r"钙化性?(?:小)?结节(?:影|灶)?"),
    *_terms("calcification", r"结节[状样]钙化(?:影|灶)?"),
    *_terms(("ground_glass", "nodule"), r"[磨毛]玻璃(?:样|状)?(?:密度)?(?:小|微)?结节(?:影|灶)?|[pm]?ggn"),
    *_terms("mass", rf"肿[块物](?:影)?|新生物|包块(?:影)?|占位(?:性病变|灶|影)?|团块[状样]?{_SHADOW}|团块(?![状样])"),
    *_terms("lesion", r"软组织(?:样)?(?:肿物|(?:密度)?(?:病灶|灶|影))"),
    *_terms("cavity", r"空洞(?:影|灶|形成)?|空腔(?:影|灶|形成)?"),
    *_terms("consolidation", r"(?:肺)?实变(?:影|灶|区)?"),
    *_terms("ground_glass", r"[磨毛]玻璃(?:样|状)?(?:密度)?(?:增高)?(?:模糊)?(?:影|灶|改变|病变)?|ggo"),
    *_terms(("ground_glass", "septal_thickening"), r"(?:铺路石|碎石路)[样状]?(?:征|改变|影)?"),
    *_terms("opacity", rf"(?:斑片|小片|大片|片|斑点|云絮|条片|絮|斑)[状样]?{_SHADOW}"),
    *_terms(
        "opacity", r"(?:斑片|小片|大片|云絮|条片)[状样]?(?=[、及和](?:(?!玻璃|实变)[^,。;、]){0,8}(?:影|灶))"
    ),  # 斑片、条索影
    *_terms("opacity", r"渗出(?:影|灶|(?:性)?(?:病变|病灶))|浸润(?:影|灶|性(?:病变|病灶))|炎性?渗出"),
    *_terms("tree_in_bud", r"树[芽丫枝](?:发芽)?(?:征|[样状](?:影|改变|结节)?|影)"),
    *_terms("miliary", r"粟粒[样状性型]?(?:微|小|微小|肺)*(?:结节|影|灶|病灶|病变|结核|播散)*"),
    *_terms("fibrosis", r"纤维(?:性)?(?:条索|索条|化|增殖|增生|硬结|瘢痕|灶)[状样性]?(?:灶|影|病灶|病变|改变)*"),
    *_terms("fibrosis", rf"(?:条索|索条)(?:[状样]?{_SHADOW}|灶|[状样])?|瘢痕(?:灶|影)?"),
    *_terms("fibrosis", r"蜂窝[状样]?(?:影|改变|肺)?"),
    *_terms("peribronchial_thickening", r"支气管血管束(?:明显|轻度|稍|略)?增[粗厚]|支气管袖套征"),
    *_terms("mosaic_attenuation", r"马赛克[样状]?(?:灌注|密度|衰减|改变|征)*|(?:空气|气体)(?:潴留|滞留|捕捉)"),
    *_terms("cardiomegaly", r"心[影脏](?:轻度|明显|显著|稍|略)+增?大"),
    *_terms("hiatal_hernia", r"(?:食管|食道)?裂孔疝"),
    *_terms("bronchiectasis", r"支扩|牵拉性支扩"),
    *_terms("atelectasis", r"(?:肺)?不张|膨胀不[全良]|萎陷"),
    *_terms("emphysema", r"(?:肺)?气肿"),
    *_terms("bulla", r"(?:肺)?大[疱泡]|肺(?:气囊|囊泡)"),
    *_terms("effusion", r"胸水|[脓血乳糜]+胸(?!膜)|液胸"),
    *_terms(("effusion", "pneumothorax"), r"液气胸|气液胸|血气胸|脓气胸"),
    *_terms("pneumothorax", r"气胸"),
    *_terms("lymphadenopathy", r"(?:肿大|增大)的?淋巴结"),
    Rule("head", "effusion", r"积液(?:影)?"),
    Rule("head", "fluid", r"(?:游离)?(?:液[体性]|水)样?(?:低)?密度(?:影|灶|区)?"),
    Rule("head", "thickening", r"增厚|肥厚|变厚"),
    Rule("head", "enlargement", r"肿大"),
    Rule("head", "growth", r"增大|扩大"),
    Rule("head", "dilatation", r"(?:柱状|囊状|囊柱状)?扩张"),
    Rule("head", "calcification", r"钙化(?:灶|影|点|斑|斑块|斑点|性病灶|性?肉芽肿)?"),
    Rule("head", "plaque", r"(?:混合)?斑块"),
    Rule("head", "atheroma", r"粥样(?:硬化)?(?:性)?(?:钙化|混合)?(?:斑块|改变)?"),
    Rule(
        "head",
        "material",
        r"(?:人工|金属)?(?:支架|起搏器|除颤器|电极|瓣膜置换|假体|植入物|封堵器|滤器|输液港|picc)(?:影|植入术?后?)?",
    ),
    Rule(
        "head",
        "material",
        r"(?:中心静脉|深静脉|引流|营养|透析)?(?:导管|置管|插管|引流管|胃管)影?|气管(?:插管|套管|导管)影?",
    ),
    Rule(
        "head",
        "material",
        r"金属[^,。;、]{0,4}?(?:影|夹|钉|板|异物|缝线|钢丝)|(?:固定)?钢丝|内固定|吻合钉|缝合?线|[钛银]夹|螺钉",
    ),
)

_ORGANS = (
    Rule("organ", "pleura", r"胸膜腔|叶间胸膜|胸膜|胸腔|叶间裂|叶间(?!隔)|肋膈角"),
    Rule("organ", "pericardium", r"心包腔?"),
    Rule("organ", "node", r"淋巴结"),
    Rule("organ", "bronchus", r"(?:细)?支气管"),
    Rule("organ", "airway", r"支气管(?:管)?壁|(?<!动脉)(?<!静脉)(?<!食)管壁|支气管血管束|支气管周围(?:间质)?"),
    Rule("organ", "wall", r"(?:气管|胸)壁|(?:食管|食道)(?:[胸颈上中下]+段)?管?壁"),
    Rule("organ", "septum", r"小叶间隔|小叶间质|小叶内间质|小叶内间隔"),
    Rule("organ", "vessel", r"主动脉弓?(?:及?分支)?(?!旁|窗)|(?:肺|头臂|锁骨下|颈总)?动脉|血管(?!束)"),
    Rule("organ", "coronary", r"[左右]?侧?冠(?:状动)?脉(?:左?(?:前降|回旋)支|主干)?|左?(?:前降支|回旋支)|左主干"),
    Rule("organ", "valve", r"(?:主动脉|[二三]尖)?瓣膜?"),
    Rule("organ", "heart", r"心影|心脏|心腔|[左右全]心[房室]?|心胸比(?:例|率)?"),
    Rule("organ", "mediastinum", r"纵隔|隆突|气管(?!壁|支气管)|肺门|食管|腔静脉后|腋窝|腋下|主动脉旁|主肺动脉窗"),
    Rule("organ", "vessel", r"肺(?:动脉|静脉)(?:干|主干)?"),
    Rule("organ", "outside", r"甲状腺|肝(?:脏|内|左叶|右叶|实质)?(?!门)|脾脏?|肾上腺|[左右双]?肾(?!上腺)脏?|胆囊"),
    Rule(
        "organ",
        "outside",
        r"胆管|胰腺?|乳腺|[左右双]乳(?!糜)|附件|背部|椎体|[胸腰颈骶]椎|腹|盆腔|皮下|前列腺|关节|垂体|脑|胃|鼻窦",
    ),
    Rule(
        "organ",
        "outside",
        r"(?:第?[\d一二三四五六七八九十]+前?后?)?肋(?!膈|间|骨?水平)骨?|[胸锁]骨(?!下)|肩胛骨|骨质|肱骨|[髂髋]骨|乳房|子宫",
    ),
    Rule("organ", "outside", r"卵巢|膀胱|输尿管|肠|胆总管|门静脉|甲状旁腺|颌下腺|腮腺|颈部|鼻咽|皮肤|脂肪间隙"),
    Rule(
        "other",
        None,
        r"囊肿|结石|血管瘤|脂肪瘤|腺瘤|憩室|动脉瘤|囊[状样性](?:低密度)?(?:影|灶)|(?<!淋巴)结节性甲状腺肿",
    ),
    Rule("organ", "lung", r"肺(?:内|实质|组织|叶|野|部)"),
)

_PLACES = (
    Rule("place", _side, r"(?:左、?右(?:两|双)?侧?|双侧|两侧|左侧|右侧|双|两|左|右)肺(?!门|动脉|静脉)"),
    Rule("place", _side, r"左、?右(?:两|双)?侧|双侧|两侧|左侧|右侧|[双两左右](?=肺门|肺动脉|肺静脉)"),
    Rule("place", _side, r"[左右双两](?=[上中下][上中下、及]{0,3}(?:肺|叶|野|胸)|胸|主支气管|舌|膈|腋|锁骨|肋)"),
    Rule("place", _levels, r"[上中下](?:[、及和]?[上中下]){0,2}(?:肺?叶|肺野|野|肺(?!门|动脉|静脉|叶|野))"),
    Rule("place", (None, (), ("upper",)), r"(?:肺|(?<=肺))尖(?!后?段)[部区]?"),
    Rule("place", (None, (), ("lower",)), r"(?<!胃)肺?基?底部|(?:肺|(?<=肺))底(?!段)"),
    Rule("place", (None, ("lower",), ()), r"(?:[前后内外侧]*)基底段|背段"),
    Rule("place", ("left", ("upper",), ()), r"(?:上)?舌叶|(?:[上下])?舌段"),
)

_SCOPE = (
    Rule("denied", None, r"(?:[均都皆]|现|目前)?(?:未见(?:(?:明[显确])?显示)?|未显示|阴性|没有|\(-\))(?=\s*(?:,|$))"),
    Rule("denied", None, r"[:：]\s*(?:无|未见|阴性|没有|\(-\))(?=\s*(?:[,)]|$))"),
    Rule("denied", "resolved", r"(?:已|均|基本|现|完全|已基本|已完全)?(?:消失|完全吸收|已吸收)(?=\s*(?:,|$))"),
    Rule("negate", None, r"(?:未见(?:到)?|未发现|未查见|未及|未触及|未探及|未提示|没有|没见|不伴有?|未伴有?|未合并)"),
    Rule("negate", None, r"(?:无(?!名|殊)|已排除|已除外|可排除|可除外|未(?=[^,]{0,2}(?:增厚|扩张|肿大|增大)))"),
    Rule("negate", None, r"不(?=[^,、]{0,2}(?:肿大|增厚|扩张))"),
    Rule("maybe_before", None, r"考虑为?|疑似|疑为|疑(?!难)|可疑|怀疑|倾向于?|可能[为是系]|似[见有呈]|拟|鉴别"),
    Rule("maybe_after", None, r"可能性(?:较)?大|可能(?:较)?大|待排除?|待除外|待鉴别|待查|待定|\?+"),
    Rule("maybe", None, r"可能性?|除外|排除|(?:不[能可]?|无法|难以|尚未|未)(?:完全)?(?:除外|排除)"),
    Rule("stop", None, r"但|然而|仅见|只见|(?:[可内隐并另余尚亦散均仍])?见(?=\S)|其余"),
    Rule("link", None, r"位于|见于|分布于|局限于|累及(?=[左右双两])"),
    Rule("within", None, r"其内|内见|内可见|病灶内|其中|该病灶|病灶"),
    Rule("within", LARGEST, r"(?:其中)?[较最]?大(?:者|一[枚个])|其大者"),
    Rule("disease", None, r"肺?结核(?:球|瘤|性)?|肿瘤|[肺腺鳞]?癌|恶性|良性|活动性|陈旧性?(?:病变|病灶|灶)?"),
    Rule("disease", None, r"炎症|炎性(?:病变|改变|肉芽肿|假瘤)?|(?:肺|胸膜|支气管)炎|感染(?:性)?(?:病变)?|真菌"),
    Rule("disease", None, r"转移瘤?|肉芽肿性?|错构瘤|淋巴瘤|血管瘤|增殖灶"),
    Rule("comma", None, r",(?!\d{3}(?!\d))|:"),
)

_ATTRIBUTES = (
    SIZE_RULE,
    Rule("size", long_size_of, rf"(?:长[径轴]|最长径)(?:约|为|达)*{SIZE}"),
    Rule("size", long_size_of, rf"(?:<|小于|不足|不超过|未超过|不大于|≤){SIZE}"),
    Rule("count", _count, r"(\d{1,2}|[一二两三四五六七八九十])\s*(?:枚|个(?!月)|处)"),
    Rule("count", 1, r"单发|孤立性?|单个|单枚|(?<=见)一(?=[^些定般枚个处])"),
    Rule("count", 0, r"多发性?|多个|多枚|多处|数个|数枚|若干|散在|弥漫性?|少许|少量散在"),
    # Before those of a change, which match as much: 较前无明显增大.
    Rule("change", "stable", rf"{_COMPARED}(?:无|未见|没有)(?:明显|显著)?{_CHANGED}(?:[或及、和]{_CHANGED})*"),
    Rule("change", "smaller", rf"(?:{_COMPARED})?{_DEGREE}(?:缩小|减小|变小|减少|吸收好转|吸收|好转|变淡|减轻)"),
    Rule("change", "larger", rf"{_COMPARED}(?:增大|增多|进展|变大|加重|扩大|增加)"),
    Rule("change", "larger", rf"{_DEGREE}(?:增多|进展|变大|加重|扩大)"),
    Rule("change", "stable", rf"(?:{_COMPARED})?(?:无|未见|没有)(?:明显|显著|确切|著)?(?:变化|改变|著变)"),
    Rule("change", "stable", rf"(?:{_COMPARED})?(?:大致|基本)?(?:相仿|同前|相同|变化不[大著]|变化不明显|稳定)"),
    Rule("change", "new", rf"(?:{_COMPARED})?(?:新发|新出现|新增|新见)"),
    Rule("skip", None, r"纹理(?:增多|增粗|紊乱|减少|稀疏)|密度(?:增高|减低)|透亮度(?:增高|增加)"),
    Rule("skip", None, r"(?:体积|容积)(?:缩小|减小)"),
)

CHINESE = Language(
    rules=(
        *(Rule("skip", None, pattern) for pattern in _SKIPPED),
        *_FINDINGS,
        *_ORGANS,
        *_PLACES,
        *_SCOPE,
        *_ATTRIBUTES,
    ),
    fillers=r"(?:影|灶|征|样|性|状|及|和|或|与|等|、|\s|明显|明确|异常|改变|病变|病灶|形成|内|等征象|表现|征象)*",
    connector=r"(?:[、及和与或/\s]|以及|合并|并|伴有?|影|灶|多发|少量|双侧)*",
    organ_gap=r"(?:[、及和与或/\s内壁走行区]|以及|合并|并|伴有?|影|灶|多发|少量|双侧)*",
    continues=r"\s*(?:或|以及|及|和|也|亦)(?:无|未见)?",
    joint=r"(?!)",
    breaks=r"(?!)",
    verb=r"(?!)",
    not_tight=r"(?!.*)",
    place_gap=r"(?:[、及和与或/,\s的部区侧近野]|以及|并|[前后内外尖基底]*段|胸膜下|肺门旁)*",
    apart=r"[、及和与伴并]",
    link=r"(?!)",
    size_gap=r"(?:大小|范围|的|厚壁|薄壁|软组织|致密|类?圆形|不规则|实性|部分|混合|稍?高|低|密度|[斑片状样]|大|直径|"
    r"\s|胸膜下)*",
    of=r"(?!)",
    locates=r"[\s约在于位大小直径长最范围的为:]*",
    respectively=r"分别",
    refers=r"\s*(?:\d|约|其|该|此|病[灶变]|大小|直径|[长短]径|最大|较大|大者|范围|径线|厚|深|边界|密度)",
    normal=r"(?:[双两]肺|胸部|心肺)[^。;]{0,16}?(?:(?:未见|无)[^,。;]{0,8}(?:异常|病变|病灶)|正常)",
)
