"""English words of the report labeller; kinds and values as in :mod:`data.report_language.terms`."""

from __future__ import annotations

import re

from data.report_language.lexer import Rule
from data.report_language.terms import NUMBER, ONE_SIZE, SIZE, SIZE_RULE, UNIT, Language, size_of

_NUMBER_WORDS = "one|two|three|four|five|six|seven|eight|nine|ten"
_COUNTS = {word: number for number, word in enumerate(_NUMBER_WORDS.split("|"), 1)}
_ABBREVIATED = {"u": "upper", "m": "middle", "l": "lower"}
_LEVEL = r"(?:upper|middle|mid|lower)"
_ADVERB = r"(?:slightly |significantly |markedly |mildly |moderately |interval |partially |nearly |substantially )*"
_LEVELS = rf"{_LEVEL}(?:(?:,|,? and|,? or| ?/| ?-| to) ?{_LEVEL}){{0,2}}"
_SOME_LEVELS = rf"{_LEVEL}(?:(?:,|,? and| ?/) ?{_LEVEL})*"
_NOT_APEX = r"segment|posterior|portion of the heart"
_OPACITY = r"opacit\w+|opacification|change\w*|densit\w+"
_HAS = r"(?:(?:has|have|had|is|are|was|were) )?"


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


def _words(kind: str, value: object, *patterns: str) -> list[Rule]:
    return [Rule(kind, value, rf"\b(?:{pattern})\b") for pattern in patterns]


def _terms(names: str, *patterns: str) -> list[Rule]:
    """``names``: the findings, joined by a plus sign where the words name several."""
    return _words("term", tuple(names.split("+")), *patterns)


_SKIPPED = (
    r"nodular (?=(?:pleural )?thickening|consolidation|contour|margin)|mass[- ]like(?= consolid)|mass effect",
    r"non-?\s?(?:calcified|cavitary|cavitating|enlarged)|(?:thoracic|chest|abdominal|peritoneal) cavity",
    r"(?:subcutaneous|mediastinal|soft[- ]tissue) emphysema|emphysema of the (?:chest|abdominal) wall",
    r"(?:left|right) (?:heart|ventric\w+|atri\w+|coronary|subclavian|hepatic|kidney|adrenal|ureter)",
    r"increased (?:density|attenuation|lung markings|lucency|bronchovascular markings)|fluid levels?|volume loss",
    r"no (?:more|larger|greater|bigger) than|not only|without contrast|with(?:out)? (?:and without )?contrast",
    rf"(?:slice|section|wall) thickness (?:of |is )?(?:about )?(?:{ONE_SIZE})|(?:{ONE_SIZE})(?: thick)? (?:slices?|"
    rf"sections?)",
    rf"wall (?:is )?(?:about )?(?:{ONE_SIZE}) thick|(?:{ONE_SIZE}) (?:away )?from(?= the)",
    rf"(?:previously|formerly|prior(?:ly)?|was|were|compared (?:to|with)) (?:measured |about |"
    rf"at )?(?:{NUMBER} ?[x×] ?)?(?:{ONE_SIZE})",
    rf"from (?:about )?(?:{NUMBER} ?[x×] ?)?{NUMBER}\s*(?:{UNIT})?(?= to)",
    r"(?:the )?larg(?:er|est)(?: (?:one|of (?:these|them|which)))?(?= (?:measur\w+|is|at|being))",
)

_FINDINGS = (
    *_terms("nodule", r"(?:micro-?)?nodules?|nodular (?:opacit\w+|densit\w+|lesions?|foc(?:us|i)|shadows?)|nodularity"),
    *_terms("calcification+nodule", r"calcified (?:[a-z]+ ){0,2}?nodules?"),
    *_terms("calcification", r"nodular calcifications?"),
    *_terms("ground_glass+nodule", r"ground[- ]?glass (?:[a-z]+ ){0,2}?nodules?|[pm]?ggns?"),
    *_terms("mass", r"mass(?:es)?|mass-like (?:lesions?|opacit\w+)|space-occupying lesions?"),
    *_terms("cavity", r"cavit(?:y|ies|ations?|ary|ated|ating)(?: lesions?| change\w*)?"),
    *_terms("consolidation", r"consolidat(?:ions?|ive|ed)(?: opacit\w+| change\w*)?"),
    *_terms("consolidation", r"air-?\s?space (?:disease|opacit\w+)"),
    *_terms("ground_glass", rf"ground[- ]?glass(?:[- ](?:{_OPACITY}|attenuation|haze))?|ggos?"),
    *_terms("opacity", r"opacit(?:y|ies)|opacification|infiltrat(?:es?|ions?)"),
    *_terms("tree_in_bud", r"tree-?\s?in-?\s?bud(?: (?:opacit\w+|nodul\w+|patterns?|appearance|change\w*|lesions?))?"),
    *_terms("miliary", r"miliary(?: (?:micro)?(?:nodul\w+|dots?|patterns?|opacit\w+|lesions?))?"),
    *_terms("miliary", r"miliary (?:micro)?(?:tuberculosis|disease|spread)"),
    *_terms("fibrosis", r"fibro(?:tic|sis|us)(?: (?:strands?|bands?|scar\w*|change\w*|stranding|opacit\w+))?"),
    *_terms("fibrosis", r"fibro(?:tic|sis|us) (?:tissue|lesions?)|(?:linear |parenchymal |apical )?scar(?:s|ring)?"),
    *_terms("fibrosis", r"(?:linear|parenchymal|reticular) (?:strand\w*|bands?)"),
    *_terms("fibrosis+calcification", r"fibro-?calcific(?: (?:change\w*|lesions?|scar\w*))?"),
    *_terms("calcification", r"calcified (?:[a-z]+ ){0,2}?(?:granulomas?|granulomata|lesions?|foc(?:us|i))"),
    *_terms("bronchiectasis", r"(?:traction )?bronchiect\w+"),
    *_terms("atelectasis", r"atelecta\w+(?: (?:bands?|change\w*))?|(?:lobar|lung|segmental|lobe) collapse"),
    *_terms("emphysema", r"emphysema(?:tous)?(?: change\w*)?"),
    *_terms("bulla", r"bullae?|bullous(?: (?:change\w*|disease|lesions?))?|blebs?"),
    *_terms("bulla+emphysema", r"bullous emphysema(?:tous change\w*)?"),
    *_terms("effusion+pneumothorax", r"(?:hydro|haemo|hemo|pyo)pneumothora(?:x|ces)"),
    *_terms("pneumothorax", r"pneumothora(?:x|ces)"),
    *_terms("effusion", r"empyemas?|(?:hydro|haemo|hemo)thora(?:x|ces)"),
    *_terms("lymphadenopathy", r"(?:lymph)?adenopathy|nodal enlargement"),
    *_words("head", "effusion", r"effusions?"),
    *_words("head", "fluid", r"fluid"),
    *_words("head", "thickening", r"thicken(?:ing|ed)"),
    *_words("head", "enlargement", r"enlarge(?:d|ment)"),
    *_words("head", "dilatation", r"dilat(?:ation|ion|ed)"),
    *_words("head", "calcification", r"calcifi(?:cations?|ed)"),
)

_ORGANS = (
    *_words("organ", "pleura", r"pleura[el]?|pleurae|costophrenic angles?|(?:pleural )?fissures?"),
    *_words("organ", "pleura", r"(?:pleural )?cavit(?:y|ies)(?<=al cavity)|pleural (?:spaces?|cavit(?:y|ies))"),
    *_words("organ", "pericardium", r"pericardi(?:al|um)(?: (?:space|cavity|sac))?"),
    *_words("organ", "node", r"(?:lymph )?nod(?:es?|al)"),
    *_words("organ", "wall", r"(?:bronchial|airway|esophageal|oesophageal|gastric) walls?"),
    *_words("organ", "wall", r"peribronchial|(?:peri)?bronchovascular"),
    *_words("organ", "bronchus", r"bronch(?:us|i|ial)|bronchioles?|airways?"),
    *_words("organ", "septum", r"(?:(?:inter|intra)?lobular )?sept(?:a|al|um)|(?:inter|intra)lobular"),
    *_words("organ", "vessel", r"aort(?:a|ic)(?: arch)?|coronary(?: arter(?:y|ies))?|arter(?:ial|y|ies)|vascular"),
    *_words("organ", "vessel", r"atherosclerotic|valv\w+|annul\w+"),
    *_words("organ", "heart", r"heart|cardiac|cardiomediastinal"),
    *_words("organ", "mediastinum", r"mediastin(?:um|al)|hila|hilar|hilum|trachea\w*|carina\w*|subcarinal"),
    *_words("organ", "mediastinum", r"axilla\w*|esophag\w+"),
    *_words("organ", "outside", r"thyroid|liver|hepatic|kidneys?|renal|adrenals?|spleen|splenic|breasts?|vertebra\w*"),
    *_words("organ", "outside", r"ribs?|pancrea\w+|gallbladder|abdom\w+|peritone\w+|prostat\w+|bones?|bony"),
    *_words("organ", "outside", r"subcutaneous|joints?|ascit\w+|uter\w+"),
    *_words("organ", "lung", r"lungs?|lobes?|pulmonary(?! arter| vein| vascul)|parenchymal?|lobar"),
)

_PLACES = (
    *_words("place", ("left", (), ()), r"left(?:-sided)?(?: lung(?! collapse))?"),
    *_words("place", ("right", (), ()), r"right(?:-sided)?(?: lung(?! collapse))?"),
    *_words("place", ("bilateral", (), ()), r"bilateral(?:ly)?|both lungs|left and right lungs?|both sides"),
    *_words("place", ("bilateral", (), ()), r"both hemithoraces"),
    *_words("place", ("bilateral", (), ()), rf"both(?= (?:{_LEVEL}|pleural|lobes|apices|bases|hila|lung))"),
    *_words("place", ("bilateral", (), ("upper",)), r"biapical(?:ly)?"),
    *_words("place", ("bilateral", (), ("lower",)), r"bibas(?:al|ilar)"),
    *_words("place", _lobe_letters, r"r[uml]l|l[ul]l"),
    *_words("place", _levels, rf"{_LEVELS}[ -](?:lung )?(?:lobes?|lobar|zones?|fields?|lungs?)"),
    Rule("place", _levels, rf"(?:(?<=right )|(?<=left )){_SOME_LEVELS}(?= |$)(?! (?:lobe|lung|zone|field))"),
    *_words("place", ("left", ("upper",), ()), r"lingula(?:r)?(?: segments?)?"),
    *_words("place", (None, (), ("upper",)), rf"(?:lung )?(?:apex|apices|apical)\b(?! (?:{_NOT_APEX}))"),
    *_words("place", (None, (), ("lower",)), r"(?:lung )?(?:bases?|basal|basilar)\b(?! segment)"),
)

_SEEN = "seen|identified|present|evident|visuali[sz]ed|detected|appreciated|demonstrated|visible|noted|found|observed"
_SCOPE = (
    *_words("denied", None, rf"(?:is|are|was|were) (?:not|no longer) (?:clearly |definitely |currently )?(?:{_SEEN})"),
    *_words("denied", None, r"(?:not|no longer) (?:seen|identified|visible|evident|present)|(?:is|are) absent"),
    *_words("denied", None, r"(?:is|are|was|were|has been|have been) (?:ruled out|excluded)"),
    Rule("denied", None, r":\s*(?:none|absent|negative|no|nil|not seen)(?=\s*(?:,|$))"),
    *_words("denied", "resolved", r"(?:has|have) (?:completely |fully |now |since )?(?:resolved|disappeared|cleared)"),
    *_words("negate", None, r"no|without|absence of|(?:interval |complete )*resolution of|free (?:of|from)|clear of"),
    *_words("negate", None, r"negative for|lack of|neither|nor|not|never"),
    *_words("negate", None, r"no (?:\w+ )?(?:evidence|signs?|suggestion) (?:of|for)|without (?:evidence|signs?) of"),
    *_words("maybe_before", None, r"possibl[ey]|probabl[ey]|suspicious for|suspicion (?:of|for)|suspect(?:ed|ing)?"),
    *_words("maybe_before", None, r"suggest(?:s|ive of|ing|ed)?|concern(?:ing)? for|worrisome for|questionable"),
    *_words("maybe_before", None, r"equivocal|(?:cannot|can ?not|can't) (?:\w+ )?(?:exclude|rule out)|rule out|r/o"),
    *_words("maybe_before", None, r"versus|vs|exclude"),
    *_words("maybe_before", None, r"(?:may|might|could)(?: (?:represent|be|reflect|indicate|have|correspond to))?"),
    *_words("maybe_after", None, r"(?:is|are) (?:possible|suspected|questioned)|(?:to be|should be) excluded"),
    *_words("maybe_after", None, r"(?:cannot|can not|can't|could not) be (?:\w+ )?(?:excluded|ruled out)"),
    *_words("maybe_after", None, r"not (?:entirely |completely )?(?:excluded|ruled out)"),
    Rule("maybe_after", None, r"\?+"),
    *_words("maybe", None, r"(?:(?:is|are) )?(?:likely|probable|favou?r(?:ed|s|ing)?|presumed)"),
    *_words("stop", None, r"but|however|although|though|except(?:ing)?(?: for)?|apart from|aside from|other than"),
    *_words("stop", None, r"while|whereas|there (?:is|are)|with"),
    *_words("stop", None, r"and (?:an?|mild|small|minimal|trace|tiny|moderate|few|multiple|some)"),
    *_words("link", None, r"located in|situated in|seen in|found in|confined to|involving|throughout"),
    Rule("within", None, r"^\s*(?:it|its|the (?:lesion|largest|larger|latter)|this|these|they|within)\b"),
    *_words("disease", None, r"tubercul\w+|infecti\w+|inflammat\w+|malignan\w+|benign|metasta\w+|tumou?rs?|cancer|tb"),
    *_words("disease", None, r"carcinomas?|pneumonia|granuloma\w*|neoplas\w+|exudate|pleurisy|lymphoma|hamartoma"),
    *_words("disease", None, r"ag(?:e|ing)|old|active|sequela\w*"),
    Rule("comma", None, r",(?!\d{3}(?!\d))|:"),
)

_COUNTED = "nodules|cavities|masses|lesions|foci|bullae|nodes"
_SMALLER = "decreas(?:e|ed|es|ing)|smaller|reduc(?:ed|tion)|regress(?:ed|ion|ing)|improv\\w+|diminished|resolving"
_SHRUNK = "shrunk(?:en)?|shrinking|partially resolved"
_LARGER = (
    "increas(?:e|ed|es|ing)|(?<=[a-z] )larger(?= than)|grown|enlarging|progress(?:ed|i(?:on|ng|ve))|worsen(?:ed|ing)"
)
_MUCH = "significant|interval|appreciable|definite|substantial"
_IN_SIZE = r"(?: in (?:size|extent|number))?"
_ATTRIBUTES = (
    SIZE_RULE,
    Rule("size", size_of, rf"\b(?:rang(?:es?|ing)|var(?:y|ies|ying))(?: in size)? from {SIZE}"),
    *_words("count", _count, rf"({_NUMBER_WORDS})\b(?! of (?:which|these|them))"),
    *_words("count", _count, rf"(\d{{1,2}})(?= (?:[a-z-]+ ){{0,2}}(?:{_COUNTED})\b)"),
    *_words("count", 1, r"(?:a )?single|(?:a )?solitary|isolated"),
    *_words("count", 0, r"multiple|several|numerous|scattered|innumerable|many|(?:a )?few|multifocal|diffuse"),
    Rule("change", "smaller", rf"\b{_HAS}(?:interval )?{_ADVERB}(?:{_SMALLER}|{_SHRUNK})\b{_IN_SIZE}"),
    Rule("change", "larger", rf"\b{_HAS}(?:interval )?{_ADVERB}(?:{_LARGER})\b{_IN_SIZE}"),
    *_words("change", "larger", r"(?:has|have) (?:\w+ )?enlarged|(?:is|are|become) (?:now |slightly )*larger"),
    *_words("change", "stable", r"unchanged|stable|similar (?:to|in (?:size|appearance|extent))|not (?:\w+ )?changed"),
    *_words("change", "stable", rf"(?:no|without) (?:(?:{_MUCH}) )*change(?: in(?: size)?)?"),
    *_words("change", "new", r"new(?:ly)?(?: (?:developed|appeared|appearing|seen))?"),
)

ENGLISH = Language(
    rules=(
        *(Rule("skip", None, rf"\b(?:{pattern})") for pattern in _SKIPPED),
        *_FINDINGS,
        *_ORGANS,
        *_PLACES,
        *_SCOPE,
        *_ATTRIBUTES,
    ),
    fillers=r"(?:\b(?:and|or|the|of|any|other|focal|significant|suspicious|definite|acute|pathologic(?:al(?:ly)?)?|lymph|"
    r"thoracic|discrete|obvious|large|frank|pneumonic|centrilobular|airspace)\b|/|\s|-)*",
    connector=r"(?:\b(?:and|or|and/or|the|an?|of|small|mild|patchy|associated|underlying|adjacent)\b|,|/|\s)*",
    continues=r"\s*(?:or|nor)\b",
    breaks=r"\b(?:mild|small|minimal|trace|tiny|moderate|large|is|are|was|were|has|have|shows?|measur\w+)\b",
    not_tight=r"\b(?:in|of|with|within|and|or|is|are|at|there|an?|the|shows?|demonstrates?|contains?|seen|along)\b|,",
    place_gap=r"(?:\b(?:and|or|the|of|in|lung|segments?|zone|portion|aspects?|anterior|posterior|lateral|medial|"
    r"superior|apical|apicoposterior|inferior|basal)\b|[,/\s-])*",
    apart=r"\b(?:and|or|with)\b|,",
    link=r"(?!.*(?:\band|,)\s+(?:in|within|at)\b)(?!.*\bwith\b)(?!.*\bbut\b).*\b(?:in|within|of|at|involving|"
    r"throughout|along|to)\b",
    size_gap=r"\s*(?:(?!(?:in|of|and|with|at|within|over|or|long|deep|thick|is|are|which|to|on|for|near|from|there|has|"
    r"have)\b)[a-z-]+\s*){0,4}",
    of=r"\s*(?:zone |lobes? |aspect |portion )?(?:of|in) (?:the )?",
    respectively=r"\brespectively\b",
    normal=r"\b(?:both lungs|the lungs|lungs) are (?:clear|normal|unremarkable)\b",
)
