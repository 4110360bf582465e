"""One sentence of a report as tokens: its clauses, its organs and the findings that its words name.

Used by ``labeller``; the words are those of a :class:`data.report_language.terms.Language`.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from data.report_language.lexer import Token
from data.report_language.terms import AMBIGUOUS, HEADS, MEASURED_ORGANS, NODE, Language

Group = tuple[int, int]  # first and last token of a list of places or organs


class Sentence:
    """Tokens of one sentence, ``text[begin:]``.

    ``text`` is the normal form of the report up to the sentence's end; ``tokens`` point into it. ``names`` are the
    findings that a token names, ``targets`` the positions of such tokens; a head that names none becomes a skip, a
    change or the lesion of another organ. ``outside``: a reference to the lesion of the sentence before means one of
    an organ outside the chest.
    """

    def __init__(
        self, text: str, begin: int, tokens: Sequence[Token], language: Language, outside: bool = False
    ) -> None:
        self.text, self.begin, self.tokens, self.language = text, begin, list(tokens), language
        self._clause = list(accumulate(token.kind == "comma" for token in tokens))  # number of each token's clause
        self.clause_count = self._clause[-1] + 1 if tokens else 1
        self._clauses = [
            range(bisect_left(self._clause, n), bisect_right(self._clause, n)) for n in range(self.clause_count)
        ]
        runs = self.groups(("organ", "place"), language.organ_gap)
        self._organ_groups = [g for g in runs if any(self._organ(i) for i in range(g[0], g[1] + 1))]
        self.organs = {organ for i in range(len(self.tokens)) if (organ := self._organ(i))}
        if outside and not self.organs and any(token.kind == "within" for token in self.tokens):
            self.organs = {"outside"}
        # The clause from which on the sentence is on organs outside the chest alone.
        named = (self._clause[i] for i in range(len(self.tokens)) if self._organ(i))
        self._outside_from = next(named, 0) if self.organs == {"outside"} else self.clause_count
        self.names = self._name_targets()
        self.targets = list(self.names)

    @property
    def own_text(self) -> str:
        return self.text[self.begin :]

    def between(self, i: int, j: int, without: tuple[str, ...] = ()) -> str:
        """Text after token i and before token j, less the tokens of some kinds."""
        return self.text_of(self.tokens[i].end, self.tokens[j].start, without)

    def text_of(self, start: int, end: int, without: tuple[str, ...] = ()) -> str:
        """Text from start to end, less the tokens of some kinds."""
        removed = [
            token for token in self.tokens if token.kind in without and start <= token.start and token.end <= end
        ]
        edges = [start, *(edge for token in removed for edge in (token.start, token.end)), end]
        return " ".join(self.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))

    def clause(self, n: int) -> range:
        """Positions of the tokens of clause n."""
        return self._clauses[n]

    def clause_number(self, i: int) -> int:
        return self._clause[i]

    def clause_of(self, i: int) -> range:
        """Positions of the tokens in the clause of token i."""
        return self._clauses[self._clause[i]]

    def has_targets(self, n: int) -> bool:
        return any(i in self.names for i in self._clauses[n])

    def clause_start(self, n: int) -> int:
        """Where the text of clause n begins, after its comma."""
        return self.tokens[self._clauses[n][0]].end if n else self.begin

    def clause_text(self, n: int, without: tuple[str, ...] = ()) -> str:
        """Text of clause n, without its comma and the tokens of some kinds."""
        end = self.tokens[self._clauses[n + 1][0]].start if n + 1 < self.clause_count else len(self.text)
        return self.text_of(self.clause_start(n), end, without)

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

        In this order: directly before it in one noun phrase; after it, joined by a preposition or as its noun; before
        it in the clause; after it in the clause; the last one of the sentence so far; one in a later clause that
        names no finding of its own (a nodule, 8 mm, right upper lobe).
        """
        clause, language = self._clause[i], self.language
        before = next((g for g in reversed(groups) if g[1] < i and self._clause[g[1]] == clause), None)
        after = next((g for g in groups if g[0] > i and self._clause[g[0]] == clause), None)
        if before and not re.search(language.not_tight, self.between(before[1], i)):
            return before, False
        gap = self.between(i, after[0]) if after else ""
        adjective = after and re.fullmatch(language.size_gap, gap)  # enlarged lymph nodes
        linked = adjective or (after and any(t.kind == "link" for t in self.tokens[i + 1 : after[0]]))
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
        later = self._clause[found[0]]
        if (
            later > self._clause[i] and self._organ(found[0]) == "outside"
        ):  # a lesion, liver; but not: the liver is normal
            bare = re.fullmatch(self.language.organ_gap, self.clause_text(later, ("organ", "place")))
            return ("outside",) if bare else ()
        return self._classes(found, i)

    def _classes(self, group: Group, i: int) -> tuple[str, ...]:
        named = [c for k in range(group[0], group[1] + 1) if (c := self._organ(k))]
        return tuple(reversed(named) if group[1] < i else named)

    def _organ(self, i: int) -> str | None:
        token = self.tokens[i]
        if token.kind == "organ":
            return token.value
        if token.kind == "place" and (any(token.value[1:]) or re.search("肺|lung", self.text[token.start : token.end])):
            return "lung"
        return None

    def _name_targets(self) -> dict[int, tuple[str, ...]]:
        names: dict[int, tuple[str, ...]] = {}
        for i, token in enumerate(self.tokens):
            if token.kind not in ("term", "head"):
                continue
            classes = self.organ_classes(i)
            found = self._names_of(i, classes)
            if found:
                names[i] = found
            elif classes[:1] and classes[0] in MEASURED_ORGANS:
                self.tokens[i] = Token("other", None, token.start, token.end)
            elif token.kind == "head" and token.value == "growth":
                self.tokens[i] = Token("change", "larger", token.start, token.end)
            else:
                self.tokens[i] = Token("skip" if token.kind == "head" else "other", None, token.start, token.end)
        if not any("lymphadenopathy" in found for found in names.values()):
            node = next(
                (i for i, token in enumerate(self.tokens) if (token.kind, token.value) == ("organ", "node")), None
            )
            names |= {node: (NODE,)} if node is not None else {}
        return dict(sorted(names.items()))

    def _names_of(self, i: int, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Findings of a term or head, given the classes of its organs, the nearest first."""
        token = self.tokens[i]
        if token.kind == "term":
            return self._inside(i, token.value, classes)
        table = HEADS[token.value]
        if set(classes) == {"lung"} and not table["*"]:  # the bronchial walls are thickened in both lungs
            before = [g for g in self._organ_groups if g[1] < i and self._clause[g[1]] == self._clause[i]]
            classes += self._classes(before[-1], i) if before else ()
        if classes[:1] in ((), ("mediastinum",)) and "node" in self.organs:  # nodes are named apart from their station
            classes = ("node", *classes)
        special = [table[c] for c in dict.fromkeys(classes) if table.get(c)]
        usual = table.get(classes[0], table["*"]) if classes else table["*"]
        return tuple(special) or self._inside(i, (usual,) if usual else (), classes)

    def _inside(self, i: int, found: tuple[str, ...], classes: tuple[str, ...]) -> tuple[str, ...]:
        """No findings that other organs have too, where such an organ is nearest or the sentence is on such organs."""
        outside = classes[:1] == ("outside",) or self._clause[i] >= self._outside_from
        return () if outside and AMBIGUOUS.issuperset(found) else found
