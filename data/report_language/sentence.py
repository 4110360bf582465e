"""One sentence of a report as tokens: its clauses, and the scope of negation and uncertainty.

Used by ``labeller``; the words are those of a :class:`data.report_language.terms.Language`.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from data.report_language.lexer import Token
from data.report_language.terms import HEADS, Language

Group = tuple[int, int]  # first and last token of a list of places or organs


class Sentence:
    """Tokens of one sentence.

    ``text`` is the normal form of the whole report, into which ``tokens`` point. ``names`` are the findings that a
    token names, ``targets`` the positions of such tokens; a head that names none becomes a skip or a change.
    """

    def __init__(self, text: str, tokens: Sequence[Token], language: Language) -> None:
        self.text, self.tokens, self.language = text, list(tokens), language
        self._clause = list(accumulate(token.kind == "comma" for token in tokens))  # number of each token's clause
        count = self._clause[-1] + 1 if tokens else 1
        self._clauses = [range(bisect_left(self._clause, n), bisect_right(self._clause, n)) for n in range(count)]
        self.names = self._name_targets()
        self.targets = list(self.names)

    def between(self, i: int, j: int, without: tuple[str, ...] = ()) -> str:
        """Text after token i and before token j, less the tokens of some kinds."""
        return self._text(self.tokens[i].end, self.tokens[j].start, range(i + 1, j), without)

    def _text(self, start: int, end: int, positions: Iterable[int], without: tuple[str, ...]) -> str:
        removed = [self.tokens[i] for i in positions if self.tokens[i].kind in without]
        edges = [start, *(edge for token in removed for edge in (token.start, token.end)), end]
        return " ".join(self.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))

    def clause_of(self, i: int) -> range:
        """Positions of the tokens in the clause of token i."""
        return self._clauses[self._clause[i]]

    def _clause_text(self, n: int, without: tuple[str, ...]) -> str:
        """Text of clause n, without its comma and the tokens of some kinds."""
        if n == 0:
            return "?"  # the text before the first token is unknown
        comma, *rest = self._clauses[n]
        end = self.tokens[self._clauses[n + 1][0]].start if n + 1 < len(self._clauses) else len(self.text)
        return self._text(self.tokens[comma].end, end, rest, without)

    def groups(self, kinds: tuple[str, ...], gap: str, without: tuple[str, ...] = ()) -> list[Group]:
        """Runs of tokens of these kinds with only ``gap`` between them."""
        found: list[Group] = []
        for i, token in enumerate(self.tokens):
            if token.kind not in kinds:
                continue
            if found and re.fullmatch(gap, self.between(found[-1][1], i, without)):
                found[-1] = (found[-1][0], i)
            else:
                found.append((i, i))
        return found

    def choose(self, i: int, groups: Sequence[Group]) -> tuple[Group | None, bool]:
        """The list of places (or organs) of token i, and whether it is in an earlier clause.

        In this order: directly before it in one noun phrase; after it and joined by a preposition; before it
        in the clause; after it in the clause; the last one of the sentence so far; one in a later clause that
        names no finding of its own (a nodule, 8 mm, right upper lobe).
        """
        clause, language = self._clause[i], self.language
        before = next((g for g in reversed(groups) if g[1] < i and self._clause[g[1]] == clause), None)
        after = next((g for g in groups if g[0] > i and self._clause[g[0]] == clause), None)
        if before and not re.search(language.not_tight, self.between(before[1], i)):
            return before, False
        gap = self.between(i, after[0]) if after else ""
        linked = after and any(t.kind == "link" for t in self.tokens[i + 1 : after[0]])
        if after and (linked or re.match(language.link, gap)):
            return after, False
        if before or (after and not re.search(language.apart, gap)):
            return before or after, False
        if earlier := next((g for g in reversed(groups) if g[1] < i), None):
            return earlier, True
        later = next((g for g in groups if g[0] > i), None)
        between = range(clause + 1, self._clause[later[0]] + 1) if later else range(0)
        own = any(self.tokens[k].kind in ("term", "head") for n in between for k in self._clauses[n])
        return (later, False) if between and not own else (None, True)

    def organ_classes(self, i: int) -> tuple[str, ...]:
        """Classes of the organs of token i, the nearest first; empty where none is named."""
        found, _ = self.choose(i, self._organ_groups)
        if found is None:
            return ()
        classes = [self._organ(k) for k in range(found[0], found[1] + 1)]
        named = [c for c in classes if c]
        return tuple(reversed(named) if found[1] < i else named)

    def _organ(self, i: int) -> str | None:
        token = self.tokens[i]
        if token.kind == "organ":
            return token.value
        if token.kind == "place" and (any(token.value[1:]) or re.search("肺|lung", self.text[token.start : token.end])):
            return "lung"
        return None

    def _name_targets(self) -> dict[int, tuple[str, ...]]:
        runs = self.groups(("organ", "place"), self.language.connector)
        self._organ_groups = [g for g in runs if any(self._organ(i) for i in range(g[0], g[1] + 1))]
        names: dict[int, tuple[str, ...]] = {}
        for i, token in enumerate(self.tokens):
            if token.kind not in ("term", "head"):
                continue
            classes = self.organ_classes(i)
            if token.kind == "term":
                found = () if classes[:1] == ("outside",) else token.value
            else:
                table = HEADS[token.value]
                special = [table[c] for c in dict.fromkeys(classes) if table.get(c)]
                usual = table.get(classes[0], table["*"]) if classes else table["*"]
                found = tuple(special) or ((usual,) if usual else ())
            if found:
                names[i] = found
            elif token.kind == "head" and token.value == "growth":
                self.tokens[i] = Token("change", "larger", token.start, token.end)
            else:
                self.tokens[i] = Token("skip", None, token.start, token.end)
        return names

    def polarities(self) -> tuple[dict[int, str], set[int]]:
        """ "present", "absent" or "uncertain" for each target, and the targets reported as resolved."""
        polarity: dict[int, str] = {}
        negated = unsure = False
        for i, token in enumerate(self.tokens):
            if token.kind == "comma":
                negated, unsure = negated and self._continues_denial(self._clause[i]), False
            elif token.kind == "stop":
                negated = unsure = False
            elif token.kind == "negate":
                negated = True
            elif token.kind == "maybe_before" or (token.kind == "maybe" and self._applies_forward(i)):
                unsure = True
            elif i in self.names:
                polarity[i] = "absent" if negated else "uncertain" if unsure else "present"
        resolved: set[int] = set()
        for i, token in enumerate(self.tokens):
            if token.kind == "denied":
                reached = self._denied_by(i)
                polarity |= dict.fromkeys(reached, "absent")
                resolved |= set(reached) if token.value == "resolved" else set()
            elif token.kind == "maybe_after" or (token.kind == "maybe" and not self._applies_forward(i)):
                for target in self._doubted_by(i):
                    polarity[target] = "uncertain" if polarity[target] == "present" else polarity[target]
        return polarity, resolved

    def _applies_forward(self, i: int) -> bool:
        """Whether a finding or disease follows token i in its clause."""
        return any(k > i and (k in self.names or self.tokens[k].kind == "disease") for k in self.clause_of(i))

    def _continues_denial(self, clause: int) -> bool:
        """Whether a clause continues a denied enumeration: bare findings, or "or …" here or later."""
        for n in range(clause, len(self._clauses)):
            kinds = {self.tokens[i].kind for i in self._clauses[n]}
            body = self._clause_text(n, ())
            if re.match(self.language.continues, body):
                return True
            if kinds & {"stop", "size", "count", "change", "denied"} or re.search(self.language.breaks, body):
                return False
            if n == clause and self._bare(n):
                return True
        return False

    def _bare(self, n: int) -> bool:
        """Whether a clause consists of findings only."""
        if not any(i in self.names for i in self._clauses[n]):
            return False
        allowed = ("term", "head", "organ", "denied")
        return re.fullmatch(self.language.fillers, self._clause_text(n, allowed)) is not None

    def _denied_by(self, i: int) -> list[int]:
        """Targets before a denial: in its clause back to a stop, and in bare clauses directly before it."""
        reached = []
        for k in range(i - 1, self.clause_of(i)[0] - 1, -1):
            if self.tokens[k].kind == "stop":
                return reached
            if k in self.names:
                reached.append(k)
        n = self._clause[i] - 1
        while reached and n >= 0 and (self._bare(n) or self._is_opening_list(n)):
            reached += [k for k in self._clauses[n] if k in self.names]
            n -= 1
        return reached

    def _is_opening_list(self, n: int) -> bool:
        """Whether this is the first clause and contains only findings and organs."""
        kinds = {self.tokens[i].kind for i in self._clauses[n]}
        return n == 0 and bool(kinds) and kinds <= {"term", "head", "organ"}

    def _doubted_by(self, i: int) -> list[int]:
        """The nearest target before an uncertainty, unless a disease is nearer, and those coordinated with it."""
        near = [k for k in self.clause_of(i) if k < i and (k in self.names or self.tokens[k].kind == "disease")]
        if not near or near[-1] not in self.names:
            return []
        reached = [near.pop()]
        while near and near[-1] in self.names:
            gap = self.between(near[-1], reached[-1], ("organ",))
            if not re.fullmatch(self.language.connector, gap):
                break
            reached.append(near.pop())
        return reached
