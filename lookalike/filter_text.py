"""Filters as people type them: `class_name = cat and (width >= 200 or not split in (train, val))`.

Comparisons are `=`, `!=`, `<`, `<=`, `>`, `>=`, `in (...)` and `not in (...)`; `not` binds tighter than `and`, `and`
tighter than `or`. Names and texts need quotes only where they hold spaces or signs, or look like something else:
`200` is a number, `"200"` a text, `true`, `false` and `null` (an empty cell) are themselves.
"""

import re

from lookalike.filters import AllOf, AnyOf, Between, Filter, Not, OneOf, Value, parse_filter, to_tree

_MOST_CHARACTERS = 10_000
_MOST_LEVELS = 50
_TOKEN = re.compile(
    r"""\s*(?: (?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
             | (?P<sign><=|>=|!=|==|=|<|>|\(|\)|,)
             | (?P<word>[^\s"'<>=!(),]+) )""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"[+-]?\d{1,300}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_CONSTANTS: dict[str, Value] = {"true": True, "false": False, "null": None}
_BOUND_NAMES = {"<": "below", "<=": "at_most", ">": "above", ">=": "at_least"}


def parse_filter_text(text: str) -> Filter:
    """Raises ValueError, which points at the place, for a text that is not of this form."""
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"filter: at most {_MOST_CHARACTERS} characters, found {len(text)}")
    reader = _Reader(text)
    condition = reader.read_any(level=1)
    if reader.kind != "end":
        raise reader.error("expected and, or, or the end")
    return parse_filter(to_tree(condition))  # whatever form a filter has, the same limits hold


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._start = self._stop = 0
        self.kind = self._token = ""
        self._advance()

    def error(self, expected: str) -> ValueError:
        found = repr(self._token) if self.kind != "end" else "the end"
        return ValueError(f"filter: {expected}, found {found} at character {self._start + 1} of {self._text!r}")

    def read_any(self, *, level: int) -> Filter:
        parts = [self._read_all(level=level)]
        while self._takes_word("or"):
            parts.append(self._read_all(level=level))
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def _read_all(self, *, level: int) -> Filter:
        parts = [self._read_one(level=level)]
        while self._takes_word("and"):
            parts.append(self._read_one(level=level))
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts))

    def _read_one(self, *, level: int) -> Filter:
        if level > _MOST_LEVELS:
            raise self.error(f"expected at most {_MOST_LEVELS} levels")
        if self._takes_word("not"):
            return Not(self._read_one(level=level + 1))
        if self._takes_sign("("):
            condition = self.read_any(level=level + 1)
            self._require_sign(")")
            return condition
        return self._read_comparison()

    def _read_comparison(self) -> Filter:
        if self.kind not in ("word", "quoted"):
            raise self.error("expected the name of a column")
        column = self._unquoted()
        self._advance()
        if self._takes_word("not"):
            if not self._takes_word("in"):
                raise self.error("expected in")
            return Not(self._read_values(column))
        if self._takes_word("in"):
            return self._read_values(column)
        sign = self._token
        if self.kind != "sign" or sign not in ("=", "==", "!=", *_BOUND_NAMES):
            raise self.error("expected =, !=, <, <=, >, >=, in or not in")
        self._advance()
        value = self._read_value()
        if sign in _BOUND_NAMES:
            if value is None or isinstance(value, bool):
                raise ValueError(f"filter: {column} {sign} needs a number or a text in {self._text!r}")
            return Between(column, **{_BOUND_NAMES[sign]: value})
        return Not(OneOf(column, (value,))) if sign == "!=" else OneOf(column, (value,))

    def _read_values(self, column: str) -> Filter:
        self._require_sign("(")
        values = [self._read_value()]
        while self._takes_sign(","):
            values.append(self._read_value())
        self._require_sign(")")
        return OneOf(column, tuple(values))

    def _read_value(self) -> Value:
        if self.kind not in ("word", "quoted"):
            raise self.error("expected a value")
        value: Value = self._unquoted()
        if self.kind == "word":
            if (word := self._token.lower()) in _CONSTANTS:
                value = _CONSTANTS[word]
            elif _INTEGER.fullmatch(self._token):
                value = int(self._token)
            elif _NUMBER.fullmatch(self._token):
                value = float(self._token)
        self._advance()
        return value

    def _unquoted(self) -> str:
        return re.sub(r"\\(.)", r"\1", self._token[1:-1]) if self.kind == "quoted" else self._token

    def _takes_word(self, word: str) -> bool:
        return self._takes("word", word)

    def _takes_sign(self, sign: str) -> bool:
        return self._takes("sign", sign)

    def _takes(self, kind: str, token: str) -> bool:
        is_here = self.kind == kind and (self._token.lower() if kind == "word" else self._token) == token
        if is_here:
            self._advance()
        return is_here

    def _require_sign(self, sign: str) -> None:
        if not self._takes_sign(sign):
            raise self.error(f"expected {sign}")

    def _advance(self) -> None:
        match = _TOKEN.match(self._text, self._stop)
        rest = self._text[self._stop :]
        self._start = self._stop + len(rest) - len(rest.lstrip())
        if match is not None and match.lastgroup is not None:
            self.kind, self._token = match.lastgroup, match.group(match.lastgroup)
            self._start, self._stop = match.start(match.lastgroup), match.end()
        elif rest.strip():
            self.kind, self._token = "sign", rest.strip()[0]
            raise self.error("cannot read this")
        else:
            self.kind, self._token = "end", ""
