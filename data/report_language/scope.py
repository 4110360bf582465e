"""Scope of negation and uncertainty in one sentence.

Cue words with a scope are NegEx's (Chapman et al. 2001): a cue reaches its findings up to a word that ends the scope.
In addition a denial follows an enumeration over its commas: "no A, B or C was seen" denies all three.
"""

from __future__ import annotations

import re

from data.report_language.sentence import Sentence

_LISTED = ("term", "head", "organ", "other", "denied")  # kinds of tokens of a bare member of an enumeration


def polarities(sentence: Sentence) -> tuple[dict[int, str], set[int]]:
    """ "present", "absent" or "uncertain" for each target, and the targets reported as resolved."""
    polarity: dict[int, str] = {}
    negated = unsure = False
    for i, token in enumerate(sentence.tokens):
        if token.kind == "comma":
            negated, unsure = negated and _continues_denial(sentence, sentence.clause_number(i)), False
        elif token.kind == "stop":
            negated = unsure = False
        elif token.kind == "negate":
            negated = True
        elif token.kind == "maybe_before" or (token.kind == "maybe" and _applies_forward(sentence, i)):
            unsure = True
        elif i in sentence.names:
            polarity[i] = "absent" if negated else "uncertain" if unsure else "present"
    resolved: set[int] = set()
    for i, token in enumerate(sentence.tokens):
        if token.kind == "denied":
            reached = _denied_by(sentence, i)
            polarity |= dict.fromkeys(reached, "absent")
            resolved |= set(reached) if token.value == "resolved" else set()
        elif token.kind == "maybe_after" or (token.kind == "maybe" and not _applies_forward(sentence, i)):
            for target in _doubted_by(sentence, i):
                polarity[target] = "uncertain" if polarity[target] == "present" else polarity[target]
    return polarity, resolved


def _applies_forward(sentence: Sentence, i: int) -> bool:
    """Whether a finding or disease follows token i in its clause."""
    clause = sentence.clause_of(i)
    return any(k > i and (k in sentence.names or sentence.tokens[k].kind == "disease") for k in clause)


def _continues_denial(sentence: Sentence, clause: int) -> bool:
    """Whether a clause continues a denied enumeration: bare findings, "or …" here or later, "A or B"."""
    language = sentence.language
    for n in range(clause, sentence.clause_count):
        body = sentence.clause_text(n)
        if re.match(language.continues, body):
            return True
        joint = re.search(language.joint, body) if sentence.has_targets(n) else None
        first = [sentence.tokens[i] for i in sentence.clause(n)]
        if joint:  # what follows the joint is the rest of the sentence: "A or B was seen in both lungs"
            body = body[: joint.start()]
            end = sentence.clause_start(n) + joint.start()
            first = [token for token in first if token.start < end]
        elif n == clause and _ends_denial(sentence, n):
            return True
        kinds = {token.kind for token in first}
        if kinds & {"stop", "size", "count", "change", "denied"} or re.search(language.breaks, body):
            return False
        if joint and ("place" not in kinds or not re.match(r"\s*and\b", joint.group())):
            return True
        if n == clause and _bare(sentence, n):
            return True
    return False


def _ends_denial(sentence: Sentence, n: int) -> bool:
    """Whether clause n has the only verb since the denial, directly after findings: "no A, B was seen"."""
    start = sentence.clause_start(n)
    verb = re.search(sentence.language.verb, sentence.clause_text(n))
    if verb is None or not sentence.has_targets(n):
        return False
    tokens = sentence.tokens[: sentence.clause(n)[0]]
    cue = max((token.end for token in tokens if token.kind == "negate"), default=start)
    before = sentence.text_of(start, start + verb.start(), _LISTED)
    no_verb = re.search(sentence.language.verb, sentence.text[cue:start]) is None
    return no_verb and re.fullmatch(sentence.language.fillers, before) is not None


def _bare(sentence: Sentence, n: int) -> bool:
    """Whether clause n consists of findings only."""
    if not sentence.has_targets(n):
        return False
    return re.fullmatch(sentence.language.fillers, sentence.clause_text(n, _LISTED)) is not None


def _denied_by(sentence: Sentence, i: int) -> list[int]:
    """Targets before a denial: in its clause back to a stop, and in the enumeration that the clause ends."""
    reached = []
    clause = sentence.clause_of(i)
    for k in range(i - 1, clause[0] - 1, -1):
        if sentence.tokens[k].kind == "stop":
            return reached
        if k in sentence.names:
            reached.append(k)
    n = sentence.clause_number(i) - 1
    joined = re.search(sentence.language.joint, sentence.clause_text(n + 1)) is not None
    while n >= 0 and ((reached and (_bare(sentence, n) or _is_opening_list(sentence, n))) or joined):
        if joined and not _enumerates(sentence, n):
            break
        reached += [k for k in sentence.clause(n) if k in sentence.names]
        n -= 1
    return reached


def _is_opening_list(sentence: Sentence, n: int) -> bool:
    """Whether this is the first clause and contains only findings and organs."""
    kinds = {sentence.tokens[i].kind for i in sentence.clause(n)}
    return n == 0 and bool(kinds) and kinds <= {"term", "head", "organ", "other"}


def _enumerates(sentence: Sentence, n: int) -> bool:
    """Whether a clause can be the beginning of an enumeration: without a verb, a quantity or another cue."""
    kinds = {sentence.tokens[i].kind for i in sentence.clause(n)}
    if kinds & {"stop", "size", "count", "change", "denied", "negate", "maybe", "maybe_before", "maybe_after"}:
        return False
    return re.search(sentence.language.breaks, sentence.clause_text(n)) is None


def _doubted_by(sentence: Sentence, i: int) -> list[int]:
    """The nearest target before an uncertainty, unless a disease is nearer, and those coordinated with it."""
    near = [k for k in sentence.clause_of(i) if k < i and (k in sentence.names or sentence.tokens[k].kind == "disease")]
    if not near or near[-1] not in sentence.names:
        return []
    reached = [near.pop()]
    while near and near[-1] in sentence.names:
        gap = sentence.between(near[-1], reached[-1], ("organ",))
        if not re.fullmatch(sentence.language.connector, gap):
            break
        reached.append(near.pop())
    return reached
