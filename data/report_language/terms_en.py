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


def _terms(name: str | tuple[str, ...], *patterns: str) -> list[Rule]:
    names = (name,) if isinstance(name, str) else name
    return [Rule("term", names, rf"\b(?:{pattern})\b") for pattern in patterns]


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
    *_terms(
        "nodule",
        r"(?:micro-?)?nodules?|nodular (?:opacit\w+|densit\w+|lesions?|foc(?:us|i)|shadows?)|"
        r"nodularity",
    ),
    *_terms(("calcification", "nodule"), r"calcified (?:[a-z]+ ){0,2}?nodules?"),
    *_terms("calcification", r"nodular calcifications?"),
    *_terms(("ground_glass", "nodule"), r"ground[- ]?glass (?:[a-z]+ ){0,2}?nodules?|[pm]?ggns?"),
    *_terms("mass", r"mass(?:es)?|mass-like (?:lesions?|opacit\w+)|space-occupying lesions?"),
    *_terms("cavity", r"cavit(?:y|ies|ations?|ary|ated|ating)(?: lesions?| change\w*)?"),
    *_terms(
        "consolidation",
        r"consolidat(?:ions?|ive|ed)(?: opacit\w+| change\w*)?|air-?\s?space (?:disease|"
        r"opacit\w+)",
    ),
    *_terms(
        "ground_glass",
        r"ground[- ]?glass(?:[- ](?:opacit\w+|opacification|attenuation|change\w*|densit\w+|"
        r"haze))?|ggos?",
    ),
    *_terms("opacity", r"opacit(?:y|ies)|opacification|infiltrat(?:es?|ions?)"),
    *_terms(
        "tree_in_bud",
        r"tree-?\s?in-?\s?bud(?: (?:opacit\w+|nodul\w+|patterns?|appearance|change\w*|"
        r"lesions?))?",
    ),
    *_terms(
        "miliary",
        r"miliary(?: (?:micro)?(?:nodul\w+|dots?|patterns?|opacit\w+|tuberculosis|disease|spread|"
        r"lesions?))?",
    ),
    *_terms(
        "fibrosis",
        r"fibro(?:tic|sis|us)(?: (?:strands?|bands?|scar\w*|change\w*|stranding|opacit\w+|tissue|"
        r"lesions?))?",
    ),
    *_terms(
        "fibrosis",
        r"(?:linear |parenchymal |apical )?scar(?:s|ring)?|(?:linear|parenchymal|"
        r"reticular) (?:strand\w*|bands?)",
    ),
    *_terms(("fibrosis", "calcification"), r"fibro-?calcific(?: (?:change\w*|lesions?|scar\w*))?"),
    *_terms("calcification", r"calcified (?:[a-z]+ ){0,2}?(?:granulomas?|granulomata|lesions?|foc(?:us|i))"),
    *_terms("bronchiectasis", r"(?:traction )?bronchiect\w+"),
    *_terms("atelectasis", r"atelecta\w+(?: (?:bands?|change\w*))?|(?:lobar|lung|segmental|lobe) collapse"),
    *_terms("emphysema", r"emphysema(?:tous)?(?: change\w*)?"),
    *_terms("bulla", r"bullae?|bullous(?: (?:change\w*|disease|lesions?))?|blebs?"),
    *_terms(("bulla", "emphysema"), r"bullous emphysema(?:tous change\w*)?"),
    *_terms(("effusion", "pneumothorax"), r"(?:hydro|haemo|hemo|pyo)pneumothora(?:x|ces)"),
    *_terms("pneumothorax", r"pneumothora(?:x|ces)"),
    *_terms("effusion", r"empyemas?|(?:hydro|haemo|hemo)thora(?:x|ces)"),
    *_terms("lymphadenopathy", r"(?:lymph)?adenopathy|nodal enlargement"),
    Rule("head", "effusion", r"\beffusions?\b"),
    Rule("head", "fluid", r"\bfluid\b"),
    Rule("head", "thickening", r"\bthicken(?:ing|ed)\b"),
    Rule("head", "enlargement", r"\benlarge(?:d|ment)\b"),
    Rule("head", "dilatation", r"\bdilat(?:ation|ion|ed)\b"),
    Rule("head", "calcification", r"\bcalcifi(?:cations?|ed)\b"),
)

_ORGANS = (
    Rule(
        "organ",
        "pleura",
        r"\b(?:pleura[el]?|pleurae|costophrenic angles?|(?:pleural )?fissures?|"
        r"(?:pleural )?cavit(?:y|ies)(?<=al cavity))\b",
    ),
    Rule("organ", "pleura", r"\bpleural (?:spaces?|cavit(?:y|ies))\b"),
    Rule("organ", "pericardium", r"\bpericardi(?:al|um)(?: (?:space|cavity|sac))?\b"),
    Rule("organ", "node", r"\b(?:lymph )?nod(?:es?|al)\b"),
    Rule(
        "organ",
        "wall",
        r"\b(?:(?:bronchial|airway|esophageal|oesophageal|gastric) walls?|peribronchial|"
        r"(?:peri)?bronchovascular)\b",
    ),
    Rule("organ", "bronchus", r"\b(?:bronch(?:us|i|ial)|bronchioles?|airways?)\b"),
    Rule("organ", "septum", r"\b(?:(?:inter|intra)?lobular )?sept(?:a|al|um)\b|\b(?:inter|intra)lobular\b"),
    Rule(
        "organ",
        "vessel",
        r"\b(?:aort(?:a|ic)(?: arch)?|coronary(?: arter(?:y|ies))?|arter(?:ial|y|ies)|vascular|"
        r"atherosclerotic|valv\w+|annul\w+)\b",
    ),
    Rule("organ", "heart", r"\b(?:heart|cardiac|cardiomediastinal)\b"),
    Rule(
        "organ",
        "mediastinum",
        r"\b(?:mediastin(?:um|al)|hila|hilar|hilum|trachea\w*|carina\w*|subcarinal|"
        r"axilla\w*|esophag\w+)\b",
    ),
    Rule(
        "organ",
        "outside",
        r"\b(?:thyroid|liver|hepatic|kidneys?|renal|adrenals?|spleen|splenic|breasts?|"
        r"vertebra\w*|ribs?|pancrea\w+)\b",
    ),
    Rule(
        "organ",
        "outside",
        r"\b(?:gallbladder|abdom\w+|peritone\w+|prostat\w+|bones?|bony|subcutaneous|joints?|"
        r"ascit\w+|uter\w+)\b",
    ),
    Rule("organ", "lung", r"\b(?:lungs?|lobes?|pulmonary(?! arter| vein| vascul)|parenchymal?|lobar)\b"),
)

_PLACES = (
    Rule("place", ("left", (), ()), r"\bleft(?:-sided)?(?: lung(?! collapse))?\b"),
    Rule("place", ("right", (), ()), r"\bright(?:-sided)?(?: lung(?! collapse))?\b"),
    Rule(
        "place",
        ("bilateral", (), ()),
        r"\b(?:bilateral|both lungs|left and right lungs?|both sides|"
        r"both hemithoraces)\b",
    ),
    Rule("place", ("bilateral", (), ()), r"\bbilaterally\b"),
    Rule("place", ("bilateral", (), ()), rf"\bboth(?= (?:{_LEVEL}|pleural|lobes|apices|bases|hila|lung))"),
    Rule("place", ("bilateral", (), ("upper",)), r"\bbiapical(?:ly)?\b"),
    Rule("place", ("bilateral", (), ("lower",)), r"\bbibas(?:al|ilar)\b"),
    Rule("place", _lobe_letters, r"\b(?:r[uml]l|l[ul]l)\b"),
    Rule(
        "place",
        _levels,
        rf"\b{_LEVEL}(?:(?:,|,? and|,? or| ?/| ?-| to) ?{_LEVEL}){{0,2}}[ -](?:lung )?(?:lobes?|lobar|zones?|"
        rf"fields?|lungs?)\b",
    ),
    Rule(
        "place",
        _levels,
        rf"(?:(?<=right )|(?<=left )){_LEVEL}(?:(?:,|,? and| ?/) ?{_LEVEL})*(?= |$)(?! (?:lobe|"
        rf"lung|zone|field))",
    ),
    Rule("place", ("left", ("upper",), ()), r"\blingula(?:r)?(?: segments?)?\b"),
    Rule(
        "place",
        (None, (), ("upper",)),
        r"\b(?:lung )?(?:apex|apices|apical)\b(?! (?:segment|posterior|portion of the heart))",
    ),
    Rule("place", (None, (), ("lower",)), r"\b(?:lung )?(?:bases?|basal|basilar)\b(?! segment)"),
)

_SEEN = (
    r"(?:seen|identified|present|evident|visuali[sz]ed|detected|appreciated|demonstrated|visible|noted|found|"
    r"observed)"
)
_SCOPE = (
    Rule("denied", None, rf"\b(?:is|are|was|were) (?:not|no longer) (?:clearly |definitely |currently )?{_SEEN}\b"),
    Rule("denied", None, r"\b(?:not|no longer) (?:seen|identified|visible|evident|present)\b|\b(?:is|are) absent\b"),
    Rule("denied", None, r"\b(?:is|are|was|were|has been|have been) (?:ruled out|excluded)\b"),
    Rule("denied", None, r":\s*(?:none|absent|negative|no|nil|not seen)(?=\s*(?:,|$))"),
    Rule(
        "denied",
        "resolved",
        r"\b(?:has|have) (?:completely |fully |now |since )?(?:resolved|disappeared|"
        r"cleared)\b",
    ),
    Rule(
        "negate",
        None,
        r"\b(?:no|without|absence of|(?:interval |complete )*resolution of|free (?:of|from)|clear of|negative for|"
        r"lack of|neither|nor|"
        r"not|never)\b",
    ),
    Rule(
        "negate",
        None,
        r"\bno (?:\w+ )?(?:evidence|signs?|suggestion) (?:of|for)\b|\bwithout (?:evidence|"
        r"signs?) of\b",
    ),
    Rule(
        "maybe_before",
        None,
        r"\b(?:possibl[ey]|probabl[ey]|suspicious for|suspicion (?:of|for)|suspected|"
        r"suspect(?:ing)?)\b",
    ),
    Rule(
        "maybe_before",
        None,
        r"\b(?:suggest(?:s|ive of|ing|ed)?|concern(?:ing)? for|worrisome for|questionable|"
        r"equivocal)\b",
    ),
    Rule("maybe_before", None, r"\b(?:may|might|could)(?: (?:represent|be|reflect|indicate|have|correspond to))?\b"),
    Rule(
        "maybe_before",
        None,
        r"\b(?:(?:cannot|can ?not|can't) (?:\w+ )?(?:exclude|rule out)|rule out|r/o|versus|"
        r"vs|exclude)\b",
    ),
    Rule("maybe_after", None, r"\b(?:is|are) (?:possible|suspected|questioned)\b"),
    Rule("maybe_after", None, r"\b(?:cannot|can not|can't|could not) be (?:\w+ )?(?:excluded|ruled out)\b"),
    Rule(
        "maybe_after",
        None,
        r"\bnot (?:entirely |completely )?(?:excluded|ruled out)\b|\b(?:to be|should be) excluded\b|\?+",
    ),
    Rule("maybe", None, r"\b(?:(?:is|are) )?(?:likely|probable|favou?r(?:ed|s|ing)?|presumed)\b"),
    Rule(
        "stop",
        None,
        r"\b(?:but|however|although|though|except(?:ing)?(?: for)?|apart from|aside from|other than|"
        r"while|whereas)\b",
    ),
    Rule(
        "stop",
        None,
        r"\b(?:there (?:is|are)|with|and (?:an?|mild|small|minimal|trace|tiny|moderate|few|multiple|"
        r"some))\b",
    ),
    Rule("link", None, r"\b(?:located in|situated in|seen in|found in|confined to|involving|throughout)\b"),
    Rule("within", None, r"^\s*(?:it|its|the (?:lesion|largest|larger|latter)|this|these|they|within)\b"),
    Rule(
        "disease",
        None,
        r"\b(?:tubercul\w+|infecti\w+|inflammat\w+|malignan\w+|benign|metasta\w+|tumou?rs?|cancer|"
        r"carcinomas?|tb)\b",
    ),
    Rule(
        "disease",
        None,
        r"\b(?:pneumonia|granuloma\w*|neoplas\w+|exudate|pleurisy|lymphoma|hamartoma|ag(?:e|ing)|"
        r"old|active|sequela\w*)\b",
    ),
    Rule("comma", None, r",(?!\d{3}(?!\d))|:"),
)

_ATTRIBUTES = (
    SIZE_RULE,
    Rule("size", size_of, rf"\b(?:rang(?:es?|ing)|var(?:y|ies|ying))(?: in size)? from {SIZE}"),
    Rule("count", _count, rf"\b({_NUMBER_WORDS})\b(?! of (?:which|these|them))"),
    Rule(
        "count",
        _count,
        r"\b(\d{1,2})(?= (?:[a-z-]+ ){0,2}(?:nodules|cavities|masses|lesions|foci|bullae|"
        r"nodes)\b)",
    ),
    Rule("count", 1, r"\b(?:(?:a )?single|(?:a )?solitary|isolated)\b"),
    Rule("count", 0, r"\b(?:multiple|several|numerous|scattered|innumerable|many|(?:a )?few|multifocal|diffuse)\b"),
    Rule(
        "change",
        "smaller",
        rf"\b{_HAS}(?:interval )?{_ADVERB}(?:decreas(?:e|ed|es|ing)|smaller|reduc(?:ed|tion)|regress(?:ed|ion|ing)|"
        rf"improv\w+|"
        r"diminished|shrunk(?:en)?|shrinking|resolving|partially resolved)\b(?: in (?:size|extent|number))?",
    ),
    Rule(
        "change",
        "larger",
        rf"\b{_HAS}(?:interval )?{_ADVERB}(?:increas(?:e|ed|es|ing)|(?<=[a-z] )larger(?= than)|grown|enlarging|"
        rf"progress(?:ed|ion|ing|ive)|"
        r"worsen(?:ed|ing))\b(?: in (?:size|extent|number))?",
    ),
    Rule("change", "larger", r"\b(?:has|have) (?:\w+ )?enlarged\b|\b(?:is|are|become) (?:now |slightly )*larger\b"),
    Rule(
        "change",
        "stable",
        r"\b(?:unchanged|stable|similar (?:to|in (?:size|appearance|extent))|not (?:\w+ )?changed)\b",
    ),
    Rule(
        "change",
        "stable",
        r"\b(?:no|without) (?:(?:significant|interval|appreciable|definite|substantial) )*change(?: in(?: size)?)?\b",
    ),
    Rule("change", "new", r"\bnew(?:ly)?(?: (?:developed|appeared|appearing|seen))?\b"),
)

_POSITIVE = r"\b(?:mild|small|minimal|trace|tiny|moderate|large|is|are|was|were|has|have|shows?|measur\w+)\b"

ENGLISH = Language(
    rules=(
        *(Rule("skip", None, rf"\b(?:{pattern})") for pattern in _SKIPPED),
        *_FINDINGS,
        *_ORGANS,
        *_PLACES,
        *_SCOPE,
        *_ATTRIBUTES,
    ),
    fillers=r"(?:\b(?:and|or|the|of|any|other|focal|significant|suspicious|definite|acute|pathologic(?:al(?:ly)?)?|"
    r"thoracic|"
    r"lymph|discrete|obvious|large|frank|pneumonic|centrilobular|airspace)\b|/|\s|-)*",
    connector=r"(?:\b(?:and|or|and/or|the|an?|of|small|mild|patchy|associated|underlying|adjacent)\b|,|/|\s)*",
    continues=r"\s*(?:or|nor)\b",
    breaks=_POSITIVE,
    not_tight=r"\b(?:in|of|with|within|and|or|is|are|at|there|an?|the|shows?|demonstrates?|contains?|seen|along)\b|,",
    place_gap=r"(?:\b(?:and|or|the|of|in|lung|segments?|zone|portion|aspects?|anterior|posterior|lateral|medial|"
    r"superior|apical|"
    r"apicoposterior|inferior|basal)\b|[,/\s-])*",
    apart=r"\b(?:and|or|with)\b|,",
    link=r"(?!.*(?:\band|,)\s+(?:in|within|at)\b)(?!.*\bwith\b)(?!.*\bbut\b).*\b(?:in|within|of|at|involving|"
    r"throughout|along|to)\b",
    size_gap=r"\s*(?:(?!(?:in|of|and|with|at|within|over|or|long|deep|thick|is|are|which|to|on|for|near|from|there|"
    r"has|have)\b)"
    r"[a-z-]+\s*){0,4}",
    of=r"\s*(?:zone |lobes? |aspect |portion )?(?:of|in) (?:the )?",
    respectively=r"\brespectively\b",
    normal=r"\b(?:both lungs|the lungs|lungs) are (?:clear|normal|unremarkable)\b",
)
