"""English words of the report labeller, those of ``findings_en`` and the rest: places, scope, attributes.

Kinds and values as in :mod:`data.report_language.terms`.
"""

from __future__ import annotations

import re

from data.report_language.findings_en import ADVERB, FINDING_RULES, HAS, ORGAN_RULES, SEQUELA, words
from data.report_language.lexer import Rule
from data.report_language.terms import LARGEST, NUMBER, ONE_SIZE, SIZE, SIZE_RULE, UNIT, Language, long_size_of, size_of

_NUMBER_WORDS = "one|two|three|four|five|six|seven|eight|nine|ten"
_COUNTS = {word: number for number, word in enumerate(_NUMBER_WORDS.split("|"), 1)}
_ABBREVIATED = {"u": "upper", "m": "middle", "l": "lower"}
_LEVEL = r"(?:upper|middle|mid|lower)"
_LEVELS = rf"{_LEVEL}(?:(?:,|,? and|,? or| ?/| ?-| to) ?{_LEVEL}){{0,2}}"
_SOME_LEVELS = rf"{_LEVEL}(?:(?:,|,? and| ?/) ?{_LEVEL})*"
_COLLAPSE = r" (?:is (?:\w+ )?)?collapse"
_NOT_APEX = r"segment|posterior|portion of the heart"
_BE = r"(?:(?:is|are|was|were|has been|have been) )"
_SEEN = (
    r"(?:seen|identified|present|evident|visuali[sz]ed|detected|appreciated|demonstrated|visible|noted|found|observed|"
    r"encountered|distinguished|discerned|monitored|followed|recogni[sz]ed|determined|revealed|shown)"
)
_TO_PREVIOUS = r"(?:in|on|at) (?:the |her |his |any )?(?:previous|prior|earlier|old|former|last|comparison)"
_CAVITY_OF = (
    r"thoracic|chest|abdominal|(?:intra-?)?peritoneal|pelvic|oral|nasal|pericardial|"
    r"uterine|endometrial|medullary|marrow|cranial|sinus|joint|glenoid|tympanic|gastric|body|pneumonectomy|lobectomy|operation|surgical|resection"
)


def _levels(match: re.Match[str]) -> tuple[None, tuple[str, ...], tuple[str, ...]]:
    text = match.group()
    levels = tuple("middle" if word == "mid" else word for word in re.findall(_LEVEL, text))
    return (None, levels, ()) if "lobe" in text or "lobar" in text else (None, (), levels)


def _lobe_letters(match: re.Match[str]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    side, level, _ = match.group()[:3]
    return ("left" if side == "l" else "right"), (_ABBREVIATED[level],), ()


def _count(match: re.Match[str]) -> int:
    word = match.group(1)
    return int(word) if word.isdigit() else _COUNTS[word]


_SKIPPED = (
    r"nodular (?=(?:pleural )?thickening|consolidation|contour|margin)|mass[- ]like(?= consolid)|mass effect",
    r"non-?\s?(?:calcified|calcific|cavitary|cavitating|enlarged|pathologic(?:al)?)|in favou?r of|fatty infiltrat\w+",
    rf"(?:(?:left|right|both|all) )?(?:{_CAVITY_OF})(?:(?:,| and| or) (?:{_CAVITY_OF}))* cavit(?:y|ies)\b",
    rf"cavit(?:y|ies) of (?:the )?(?:{_CAVITY_OF})|cavit(?:y|ies)(?= of the heart)",
    rf"{SEQUELA} (?=(?:calcif|nodul|thicken|granul|fractur))|(?:fracture|operation|surg\w+) {SEQUELA}",
    r"(?:subcutaneous|mediastinal|soft[- ]tissue) emphysema|emphysema of the (?:chest|abdominal) wall",
    r"(?:left|right) (?:subclavian|ureter)|calcium score|(?:nodules?|lesions?) (?:may|might) be (?:overlooked|missed)",
    r"(?:adjacent to|neighbou?ring|next to|close to|abutting|at the level of)(?: the)?(?: [a-z0-9]+){0,2}? (?:ribs?|"
    r"costa\w*|vertebra\w*|spine|sternum|liver|spleen|stomach)",
    r"increased (?:attenuation|lung markings|lucency|bronchovascular markings)|fluid levels?|volume loss",
    r"not only|without contrast|with(?:out)? (?:and without )?contrast|no contrast",
    rf"(?:slice|section|wall) thickness (?:of |is )?(?:about )?(?:{ONE_SIZE})|(?:{ONE_SIZE})(?: thick)? (?:slices?|"
    rf"sections?)",
    rf"wall (?:is )?(?:about )?(?:{ONE_SIZE}) thick|(?:{ONE_SIZE}) (?:away )?from(?= the)",
    rf"(?:previously|formerly|prior(?:ly)?|compared (?:to|with)) (?:measur\w+ |was |were |about |at )*"
    rf"(?:{NUMBER} ?[x×] ?)?(?:{ONE_SIZE})",
    rf"(?:was|were|measured) (?:about )?(?:{NUMBER} ?[x×] ?)?"
    rf"(?:{ONE_SIZE})(?= (?:previously|before|earlier|{_TO_PREVIOUS}))",
    rf"from (?:about )?(?:{NUMBER} ?[x×] ?)?{NUMBER}\s*(?:{UNIT})?(?= to)",
    r"(?<!, the )(?<!, )(?:the )?larg(?:er|est)(?: (?:one|of (?:these|them|which)))?(?= (?:measur\w+|is|at|being))",
)

_PLACES = (
    *words("place", ("left", (), ()), rf"left(?:-sided)?(?: lung(?!{_COLLAPSE}))?"),
    *words("place", ("right", (), ()), rf"right(?:-sided)?(?: lung(?!{_COLLAPSE}))?"),
    *words("place", ("bilateral", (), ()), r"bilateral(?:ly)?|both lungs|left and right lungs?|both sides"),
    *words("place", ("bilateral", (), ()), r"both hemithoraces"),
    *words("place", ("bilateral", (), ()), rf"both(?= (?:{_LEVEL}|pleural|lobes|apices|bases|hila|lung))"),
    *words("place", ("bilateral", (), ("upper",)), r"biapical(?:ly)?"),
    *words("place", ("bilateral", (), ("lower",)), r"bibas(?:al|ilar)"),
    *words("place", _lobe_letters, r"r[uml]l|l[ul]l"),
    *words("place", _levels, rf"{_LEVELS}[ -](?:lung )?(?:lobes?|lobar|zones?|fields?|lungs?)"),
    Rule("place", _levels, rf"(?:(?<=right )|(?<=left )){_SOME_LEVELS}(?= |$)(?! (?:lobe|lung|zone|field))"),
    *words("place", ("left", ("upper",), ()), r"lingula(?:r)?(?: segments?)?"),
    *words("place", (None, (), ("upper",)), rf"(?:lung )?(?:apex|apices|apical)\b(?! (?:{_NOT_APEX}))"),
    *words("place", (None, (), ("lower",)), r"(?:lung )?(?:bases?|basal|basilar)\b(?! segment)"),
)

_NOT = r"(?:not|no longer) (?:been )?(?:clearly |definitely |currently )?"
_SCOPE = (
    *words("denied", None, rf"(?:(?:is|are|was|were|has|have|had|could|can) )?{_NOT}(?:be )?{_SEEN}"),
    *words("denied", None, r"(?:is|are) absent|(?:has|have) been removed|(?:was|were) removed"),
    *words("denied", None, r"(?:is|are|was|were|has been|have been) (?:ruled out|excluded)"),
    Rule("denied", None, rf":\s*(?:none|absent|negative|no|nil|not {_SEEN})(?=\s*(?:,|$))"),
    *words("denied", "resolved", r"(?:has|have) (?:completely |fully |now |since )?(?:resolved|disappeared|cleared)"),
    *words("negate", None, r"no|without|absence of|(?:interval |complete )*resolution of|free (?:of|from)|clear of"),
    *words("negate", None, r"negative for|lack of|neither|nor|not|never"),
    *words("negate", None, r"(?:below|under|smaller than|less than)(?= (?:the )?patholog)"),
    *words("negate", None, r"no (?:\w+ )?(?:evidence|signs?|suggestion) (?:of|for)|without (?:evidence|signs?) of"),
    *words("maybe_before", None, r"possibl[ey]|probabl[ey]|suspicious for|suspicion (?:of|for)|suspect(?:ed|ing)?"),
    *words("maybe_before", None, r"suggest(?:s|ive of|ing|ed)?|concern(?:ing)? for|worrisome for|questionable"),
    *words("maybe_before", None, r"equivocal|(?:cannot|can ?not|can't) (?:\w+ )?(?:exclude|rule out)|rule out|r/o"),
    *words("maybe_before", None, r"versus|vs|exclude"),
    *words("maybe_before", None, r"(?:may|might|could)(?: (?:represent|be|reflect|indicate|have|correspond to))?"),
    *words("maybe_after", None, r"(?:is|are) (?:possible|suspected|questioned)|(?:to be|should be) excluded"),
    *words("maybe_after", None, r"(?:cannot|can not|can't|could not) be (?:\w+ )?(?:excluded|ruled out)"),
    *words("maybe_after", None, r"not (?:entirely |completely )?(?:excluded|ruled out)"),
    Rule("maybe_after", None, r"\?+"),
    *words("maybe", None, r"(?:(?:is|are) )?(?:likely|probable|favou?r(?:ed|s|ing)?|presumed)"),
    *words("stop", None, r"but|however|although|though|except(?:ing)?(?: for)?|apart from|aside from|other than"),
    *words("stop", None, r"while|whereas|there (?:is|are)|(?<=, )with"),
    *words("stop", None, r"(?:and|with) (?:an?|mild|small|minimal|trace|tiny|moderate|few|multiple|some)"),
    *words("stop", None, rf"{_BE}{_SEEN},? and"),
    *words("link", None, r"located in|situated in|seen in|found in|confined to|involving|throughout"),
    Rule("within", LARGEST, r"(?<=, )the larg(?:er|est)(?: one)?(?: of (?:which|these|them))?(?! of)"),
    Rule("within", None, r"^\s*(?:it|its|the (?:lesion|largest|larger|latter)|this|these|they|their|within)\b"),
    *words("disease", None, r"tubercul\w+|infecti\w+|inflammat\w+|malignan\w+|benign|metasta\w+|tumou?rs?|cancer|tb"),
    *words("disease", None, r"carcinomas?|pneumonia|granuloma\w*|neoplas\w+|exudate|pleurisy|lymphoma|hamartoma"),
    *words("disease", None, r"ag(?:e|ing)|old|active"),
    Rule("comma", None, r",(?!\d{3}(?!\d))|:"),
)

_COUNTED = "nodules|cavities|masses|lesions|foci|bullae|nodes"
_SMALLER = "decreas(?:e|ed|es|ing)|smaller|reduc(?:ed|tion)|regress(?:ed|ion|ing)|improv\\w+|diminished|resolving"
_SHRUNK = "shrunk(?:en)?|shrinking|partially resolved"
_LARGER = (
    "increas(?:e|ed|es|ing)|(?<=[a-z] )larger(?= than)|grown|enlarging|progress(?:ed|i(?:on|ng|ve))|worsen(?:ed|ing)"
)
_MUCH = "significant|interval|appreciable|definite|substantial"
_BELOW = (
    r"less than|smaller than|below|under|shorter than|(?:do(?:es)? )?not (?:exceed(?:ing)?|reach(?:ing)?)|"
    r"(?:not|no) (?:larger|greater|bigger|more|longer) than"
)
_IN_SIZE = r"(?: in (?:size|extent|number))?"
_ATTRIBUTES = (
    SIZE_RULE,
    Rule("size", long_size_of, rf"\blong(?:est)?(?: axis| diameter)*(?: of| is| measur\w+| about| up to)* {SIZE}"),
    Rule("size", long_size_of, rf"(?:<|\b(?:{_BELOW}) )\s*{SIZE}"),
    Rule("size", size_of, rf"\b(?:rang(?:es?|ing)|var(?:y|ies|ying))(?: in size)? from {SIZE}"),
    *words("count", _count, rf"({_NUMBER_WORDS})\b(?! of (?:which|these|them))"),
    *words("count", _count, rf"(\d{{1,2}})(?= (?:[a-z-]+ ){{0,2}}(?:{_COUNTED})\b)"),
    *words("count", 1, r"(?:a )?single|(?:a )?solitary|isolated"),
    *words("count", 0, r"multiple|several|numerous|scattered|innumerable|many|(?:a )?few|multifocal|diffuse"),
    Rule("change", "smaller", rf"\b{HAS}(?:interval )?{ADVERB}(?:{_SMALLER}|{_SHRUNK})\b{_IN_SIZE}"),
    Rule(
        "change",
        "larger",
        rf"(?<!density )(?<!densities )(?<!thickness )\b{HAS}(?:interval )?{ADVERB}(?:{_LARGER})\b{_IN_SIZE}",
    ),
    *words("change", "larger", r"(?:has|have) (?:\w+ )?enlarged|(?:is|are|become) (?:now |slightly )*larger"),
    *words("change", "stable", r"unchanged|stable|similar (?:to|in (?:size|appearance|extent))|not (?:\w+ )?changed"),
    *words(
        "change",
        "stable",
        rf"(?:no|without) (?:(?:{_MUCH}) )*(?:change|difference)(?: in(?: the)?(?: sizes?)?(?: of)?)?",
    ),
    *words(
        "change",
        "stable",
        rf"no (?:(?:{_MUCH}) )*(?:increase|decrease) in (?:the )?(?:size|number|dimension)s?(?: of)?",
    ),
    *words("change", "new", rf"(?:(?:which|that) )?{_BE}?not {_SEEN} {_TO_PREVIOUS}"),
    *words("change", "new", r"new(?:ly)?(?: (?:developed|appeared|appearing|seen))?"),
)

ENGLISH = Language(
    rules=(
        *(Rule("skip", None, rf"\b(?:{pattern})") for pattern in _SKIPPED),
        *FINDING_RULES,
        *ORGAN_RULES,
        *_PLACES,
        *_SCOPE,
        *_ATTRIBUTES,
    ),
    fillers=r"(?:\b(?:and|or|the|of|any|other|focal|significant|suspicious|definite|acute|active|patholog\w+|lymph|"
    r"thoracic|discrete|obvious|large|frank|pneumonic|centrilobular|airspace|areas?|an?|infiltrative|occupying)\b|/|\s|-)*",
    connector=r"(?:\b(?:and|or|and/or|the|an?|of|small|mild|patchy|associated|underlying|adjacent)\b|,|/|\s)*",
    organ_gap=r"(?:\b(?:and|or|the|an?|of|in|its|their|both|main|major|all|walls?|branch(?:es)?|ascending|descending|arch|"
    r"thoracic|abdominal|proximal|distal|as well as|small|regions?|areas?|stations?|trunk|vessels?)\b|,|/|-|\s)*",
    continues=r"\s*(?:or|nor)\b",
    joint=r"\b(?:or|nor)\b|\band\b(?! without)",
    breaks=r"\b(?:mild|small|minimal|trace|tiny|moderate|large|is|are|was|were|has|have|shows?|measur\w+)\b",
    verb=rf"{_BE}{_SEEN}\b",
    not_tight=r"\b(?:in|of|with|by|within|and|or|is|are|at|there|an?|the|shows?|demonstrates?|contains?|seen|along)\b|,",
    place_gap=r"(?:\b(?:and|or|the|of|in|lung|segments?|zone|portion|aspects?|anterior|posterior|lateral|medial|"
    r"superior|apical|apicoposterior|inferior|basal)\b|[,/\s-])*",
    apart=r"\b(?:and|or|with)\b|,",
    link=r"(?!.*(?:\band|,)\s+(?:in|within|at)\b)(?!.*\bwith\b)(?!.*\bbut\b).*\b(?:in|within|of|at|involving|"
    r"throughout|along|to)\b",
    size_gap=r"\s*(?:(?!(?:in|of|and|with|at|within|over|or|long|deep|thick|is|are|which|to|on|for|near|from|there|has|"
    r"have)\b)[a-z-]+\s*){0,4}",
    of=r"\s*(?:zone |lobes? |aspect |portion )?(?:of|in) (?:the )?",
    locates=r"[\s:]*(?:(?:is|it|lies|located|situated|measuring|measures|in|at|the|of)\b\s*)*",
    respectively=r"\brespectively\b",
    refers=r"\s*(?:\d|(?:it|its|they|their|this|these|which|measur\w+|sizes?|diameters?|dimensions?|maximum|approximately|about|"
    r"up to|short|long|(?:the )?(?:largest|larger|biggest|lesions?|longest|short|long|size|diameter|dimensions?))\b)",
    normal=r"\b(?:both lungs|the lungs|lungs) are (?:clear|normal|unremarkable)\b",
)
