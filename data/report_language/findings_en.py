"""English words for findings and organs; kinds and values as in :mod:`data.report_language.terms`."""

from __future__ import annotations

from data.report_language.lexer import Rule

ADVERB = r"(?:slightly |significantly |markedly |mildly |moderately |interval |partially |nearly |substantially )*"
HAS = r"(?:(?:has|have|had|is|are|was|were) )?"
SEQUELA = r"sequell?(?:ae?|al|ar|as|es?|s)?"
_OPACITY = r"opacit\w+|opacification|change\w*|densit\w+"
_TAIL = (  # of a scar: what it is made of
    rf"(?:[ -](?:and |or )?(?:{SEQUELA}|fibro(?:tic|sis)|parenchymal|pleuro-?parenchymal|linear|reticular|bands?|"
    r"strand\w*|scar\w*|changes?|opacit\w+|densit\w+|increases?|recessions?|retractions?|structures?|lesions?|areas?|"
    r"tissue))*"
)
_PARENCHYMAL = r"(?:(?:pleuro-?\s?parenchymal|parenchymal|linear|reticular|subpleural|fibrotic|band-?like)[ -])*"
_LARGE = r"(?:larger|enlarged|big|increased|above (?:the )?normal|greater)"
_SLIDING = r"(?:sliding|mixed|axial)(?:[- ]type)?"
_MATERIAL = (
    r"catheters?|port(?:-?a-?cath| chamber| reservoir)s?|pace-?\s?makers?(?: (?:electrodes?|leads?|batter\w+|wires?))*",
    r"electrodes?|icd|picc(?: lines?)?|(?:central|venous|dialysis) lines?|defibrillators?|stents?(?: grafts?)?",
    r"implants?|(?:bypass|aortic|vascular) grafts?|prosthe(?:sis|ses|tic)|valve replacement|sternotomy|cerclage",
    r"(?:sternal|surgical|metallic|suture|sternotomy|bypass|operation) (?:wires?|sutures?|clips?|staples?|materials?)",
    r"metallic (?:densit\w+|objects?)|(?:chest|drain(?:age)?|thoracostomy|tracheostomy|feeding|et|ng) tubes?|staples",
    r"(?:endotracheal|nasogastric|intubation) (?:tubes?|cannula\w*)|tracheostomy(?: cannula\w*)?|cannulas?|drains?",
    r"screws?|instrumentation|fixators?|osteosynthesis|coils?|stabili[sz]ation materials?",
    r"medical (?:materials?|devices?)|gastrostomy|fixation materials?|(?:cava|caval|ivc) filters?|sutures?|clips",
)


def words(kind: str, value: object, *patterns: str) -> list[Rule]:
    return [Rule(kind, value, rf"\b(?:{pattern})\b") for pattern in patterns]


def _terms(names: str, *patterns: str) -> list[Rule]:
    """``names``: the findings, joined by a plus sign where the words name several."""
    return words("term", tuple(names.split("+")), *patterns)


_LUNG = (
    *_terms("nodule", r"(?:micro-?)?nodules?|nodularity|nodular (?:opacit\w+|densit\w+|lesions?|foc(?:us|i)|shadows?)"),
    *_terms("nodule", r"nodular (?:formations?|structures?|appearances?)|nodular(?=-infiltrat)"),
    *_terms("nodule", r"nodular(?=(?:,? or|,? and|,) (?:[a-z]+ )?(?:infiltrat\w+|mass|cavitary) lesions?)"),
    *_terms("calcification+nodule", r"calcifi(?:ed|c) (?:[a-z]+ ){0,2}?nodules?"),
    *_terms("calcification", r"nodular calcifications?"),
    *_terms("ground_glass+nodule", r"(?:ground|frosted)[- ]?glass (?:[a-z]+ ){0,2}?nodules?|[pm]?ggns?"),
    *_terms("mass", r"mass(?:es)?(?: lesions?)?|mass-like (?:lesions?|opacit\w+)|space-occupying lesions?"),
    *_terms("lesion", r"soft[- ]tissue (?:density )?lesions?"),
    *_terms("cavity", r"cavit(?:y|ies|ations?|ary|ated|ating)(?: (?:lesions?|change\w*|areas?))?"),
    *_terms("consolidation", rf"(?:pneumonic )?consolidat(?:ions?|ive|ed)(?:[ -](?:{_OPACITY}|areas?))*"),
    *_terms("consolidation", r"air-?\s?space (?:disease|opacit\w+)"),
    *_terms(
        "ground_glass", rf"(?:nodular )?(?:ground|frosted)[- ]?glass(?:[- ](?:{_OPACITY}|attenuation|areas?))*|ggos?"
    ),
    *_terms("ground_glass+septal_thickening", r"crazy[- ]paving|(?:cobble|paving )stone (?:pattern|appearance|view)"),
    *_terms("opacity", r"opacit(?:y|ies)|opacification|infiltrat(?:es?|ions?)"),
    *_terms("opacity", r"infiltrative(?: (?:lesions?|areas?|change\w*))?"),
    *_terms("opacity", r"densit(?:y|ies) increases?|increased densit(?:y|ies)|increases? in (?:parenchymal )?density"),
    *_terms("opacity", r"(?:patchy|hazy|reticulo\w+|reticular|acinar|alveolar) densit(?:y|ies)(?: increases?)?"),
    *_terms("opacity", r"(?:peripheral|dependent) densit(?:y|ies)(?: increases?)?"),
    *_terms("opacity", r"(?<!tissue )(?<!calcific )(?<!metallic )(?<!fat )(?<!bone )densities"),
    *_terms("tree_in_bud", r"tree-?\s?in-?\s?bud(?: (?:opacit\w+|nodul\w+|patterns?|appearance|change\w*|lesions?))?"),
    *_terms("tree_in_bud", r"bud(?:ding|ded)?[- ](?:in[- ])?trees?(?: (?:opacit\w+|nodul\w+|patterns?|appearance))?"),
    *_terms("miliary", r"miliary(?: (?:micro)?(?:nodul\w+|dots?|patterns?|opacit\w+|lesions?))?"),
    *_terms("miliary", r"miliary (?:micro)?(?:tuberculosis|disease|spread)"),
    *_terms("fibrosis", rf"{_PARENCHYMAL}(?:fibro(?:tic|sis|us)|{SEQUELA}|scar(?:s|ring)?){_TAIL}"),
    *_terms("fibrosis", r"(?:linear|parenchymal|reticular|pleuro-?parenchymal) (?:strand\w*|bands?)|honeycomb\w*"),
    *_terms("fibrosis", r"pleuro-?\s?parenchymal (?:changes?|lines?)|linear (?:opacit\w+|lines?)"),
    *_terms("fibrosis", r"(?:linear|pleuro-?parenchymal|band-?like) (?:subpleural )?densit(?:y|ies)(?: increases?)?"),
    *_terms("fibrosis+atelectasis", r"fibro-?atelecta\w+(?: (?:bands?|change\w*|densit\w+|sequel\w*))*"),
    *_terms("fibrosis+calcification", r"fibro-?calcific(?: (?:change\w*|lesions?|scar\w*|sequel\w*))*"),
    *_terms("calcification", r"calcifi(?:ed|c) (?:[a-z]+ ){0,2}?(?:granulomas?|granulomata|lesions?|foc(?:us|i))"),
    *_terms("bronchiectasis", r"(?:traction )?bronchiecta\w+(?: change\w*)?"),
    *_terms("peribronchial_thickening", r"peri-?bronchial (?:cuff(?:ing|s)|sheathing)"),
    *_terms("mosaic_attenuation", r"mosaic(?:[- ](?:attenuation|perfusion|density|lung|patterns?|appearance|areas?))*"),
    *_terms("mosaic_attenuation", r"air[- ]trapping"),
    *_terms("atelectasis", r"atelecta\w+(?: (?:bands?|change\w*|densit\w+|areas?))*"),
    *_terms("atelectasis", r"(?:lobar|lung|segmental|lobe) collapse|collapsed (?:lung|lobe)"),
    *_terms("atelectasis", r"(?:lung|lobe) is (?:\w+ )?collapsed"),
    *_terms("emphysema", r"emphysema(?:tous)?(?: (?:change\w*|areas?))?"),
    *_terms("bulla", r"bullae?|bullous(?: (?:change\w*|disease|lesions?))?|blebs?"),
    *_terms("bulla+emphysema", r"(?:bullous|bullo)[- ]?emphysema(?:tous change\w*)?"),
)
_ELSEWHERE = (
    *_terms("effusion+pneumothorax", r"(?:hydro|haemo|hemo|pyo)pneumothora(?:x|ces)"),
    *_terms("pneumothorax", r"pneumothora(?:x|ces)"),
    *_terms("effusion", r"empyemas?|(?:hydro|haemo|hemo)thora(?:x|ces)"),
    *_terms("lymphadenopathy", r"(?:conglomerate )?(?:lymph)?adeno(?:pathy|pathies|megaly|megalies)|laps?"),
    *_terms("lymphadenopathy", r"nodal enlargement|conglomerate(?:d)? (?:lymph )?nodes?"),
    *_terms("cardiomegaly", r"cardiomegaly"),
    *_terms(
        "cardiomegaly",
        rf"(?:heart|cardiac)(?: (?:sizes?|dimensions?|diameters?|silhouette|shadow|and))* {HAS}{ADVERB}{_LARGE}",
    ),
    *_terms(
        "cardiomegaly",
        rf"(?:cardio-?thoracic (?:ratio|index)|(?:size|dimensions?|diameter) of the heart) {HAS}{ADVERB}{_LARGE}",
    ),
    *_terms("cardiomegaly", r"(?:increased?|enlarged|large)(?: in)?(?: the)? (?:heart|cardiac) (?:size|dimensions?)"),
    *_terms("cardiomegaly", r"increased?(?: in)?(?: the)? cardio-?thoracic (?:index|ratio)"),
    *_terms("hiatal_hernia", rf"(?:{_SLIDING} )*(?:hiat(?:al|us)|(?:para)?o?esophageal|diaphragmatic) hernia\w*"),
    *_terms("hiatal_hernia", rf"{_SLIDING} hernia\w*|hernia\w* (?:at|of|through) the hiatus"),
)
_HEADS = (
    *words("head", "effusion", r"effusions?"),
    *words("head", "fluid", r"fluid"),
    *words(
        "head",
        "thickening",
        r"thicken(?:ings?|ed)|thickness increases?|increased thickness",
    ),
    *words("head", "thickening", r"increased?(?= (?:in )?(?:the )?(?:[a-z]+ ){0,3}?thickness)"),
    *words("head", "thickening", r"thickness(?:es)? (?:is|are|was|has|have) increased"),
    *words("head", "enlargement", r"enlarge(?:d|ment)"),
    *words("head", "growth", r"(?:larger|wider|greater|bigger) than (?:normal|usual)|increased in size"),
    *words(
        "head", "pathological", r"pathologic(?:al(?:ly)?)?(?: (?:size[sd]?|dimensions?|enlarged|and|or|appearance))*"
    ),
    *words("head", "prominence", r"prominen(?:t|ce)"),
    *words("head", "pathological", r"conglomerat\w+"),
    *words("head", "dilatation", r"dilat(?:ations?|ions?|ed)|ectasia|ectatic"),
    *words(
        "head", "calcification", r"calcifi(?:cations?|ed|c)(?: (?:wall )?(?:plaques?|change\w*|densit\w+|foc(?:us|i)))?"
    ),
    *words("head", "plaque", r"plaques?"),
    *words(
        "head",
        "atheroma",
        r"(?:calcifi\w+ )?(?:atheroma\w*|athero-?sclero\w+)(?: (?:wall|calcifi\w+|plaques?|change\w*|lesions?|and))*",
    ),
    *words("head", "material", *_MATERIAL),
)
FINDING_RULES = (*_LUNG, *_ELSEWHERE, *_HEADS)

_SIDED = r"(?:(?:left|right|both|bilateral) )?"
ORGAN_RULES = (
    *words("organ", "pleura", r"pleura[el]?|pleurae|costophrenic (?:angles?|sinus\w*)|(?:pleural )?fissures?"),
    *words("organ", "pleura", r"pleural (?:spaces?|cavit(?:y|ies))|hemithora\w+"),
    *words("organ", "pericardium", r"pericardi(?:al|um)(?: (?:space|cavity|sac|area))?"),
    *words("organ", "node", r"(?:lymph |lymphatic )?nod(?:es?|al)"),
    *words("organ", "wall", r"(?:o?esophageal|tracheal|chest) walls?"),
    *words("organ", "airway", r"(?:bronchial|bronchiolar|airway) walls?|walls? of the (?:bronch\w+|airways?)"),
    *words("organ", "airway", r"peri-?bronchial|(?:peri-?)?broncho?vascular"),
    *words("organ", "bronchus", r"bronch(?:us|i|ial)|bronchioles?|airways?"),
    *words("organ", "septum", r"(?:(?:inter|intra)?-?lobular )?sept(?:a|al|um)|(?:inter|intra)-?lobular"),
    *words(
        "organ", "vessel", r"aort(?:a|ic)(?: arch)?|arter(?:ial|y|ies)|vascular|supra-?aortic|brachiocephalic|carotid"
    ),
    *words("organ", "vessel", r"pulmonary (?:arter\w+|veins?|trunk)"),
    *words(
        "organ", "coronary", rf"{_SIDED}(?:main )?coronar(?:y|ies)(?: (?:arter(?:y|ies)|vascular structures|vessels))?"
    ),
    *words("organ", "coronary", r"left anterior descending(?: (?:coronary )?arter(?:y|ies))?|lad|lmca|rca|circumflex"),
    *words("organ", "valve", r"valv\w+|annul\w+|(?:aortic|mitral|tricuspid) (?:valv\w+|annul\w+)|mitral"),
    *words("organ", "heart", rf"{_SIDED}(?:heart|ventric\w+|atri(?:um|a|al))|cardiac|bi(?:atri|ventric)\w+"),
    *words("organ", "heart", rf"{_SIDED}(?:heart|cardiac|atrial|ventricular) (?:cavit(?:y|ies)|chambers?)"),
    *words("organ", "heart", r"cardiomediastinal|inter(?:ventricular|atrial) sept\w+"),
    *words("organ", "mediastinum", r"mediastin(?:um|al)|hila|hilar|hilum|trachea\w*|carina\w*|subcarinal"),
    *words("organ", "mediastinum", r"axilla\w*|o?esophag\w+|(?:pre|para)-?\s?aortic"),
    *words(
        "organ",
        "outside",
        rf"{_SIDED}(?:thyroid|liver|hepatic|kidneys?|renal|adrenals?|spleen|splenic|breasts?)(?: glands?)?",
    ),
    *words("organ", "outside", r"(?:(?:both|left|right) )?lobes? of (?:the )?(?:thyroid|liver|prostate)"),
    *words(
        "organ", "outside", r"vertebra\w*|ribs?|pancrea\w+|gallbladder|abdom\w+|peritone\w+|prostat\w+|bon(?:es?|y)"
    ),
    *words("organ", "outside", r"subcutaneous|joints?|ascit\w+|uter\w+|scapula\w*|clavic\w+|stern(?:um|al)|humer\w+"),
    *words("organ", "outside", r"spine|spinal|costal|paraspinal|stomach|gastric|bowel|colon\w*|mesenter\w+|oment\w+"),
    *words("organ", "outside", r"bladder|ovar\w+|biliary|bile ducts?|choledoch\w+|skin|fat(?:ty)? (?:tissue|planes?)"),
    *words("organ", "lung", r"lungs?|pulmonary(?! arter| vein| vascul| trunk)"),
    *words("other", None, r"cysts?|cystic lesions?|stones?|calcul(?:us|i)|(?:angiomyo)?lipomas?|aneurysms?"),
    *words("other", None, r"adenomas?|ha?emangiomas?|hypodense (?:lesions?|areas?)|(?:lytic|sclerotic) lesions?"),
)
