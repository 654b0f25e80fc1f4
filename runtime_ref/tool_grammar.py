"""The grammar of calls of tools: only tools that there are, with arguments that fulfil their JSON Schemas."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runtime_ref.errors import InputError
from runtime_ref.grammar import Grammar, Vocabulary, json_grammar
from runtime_ref.tool_calls import JSON, PAIRS

# Keywords of a schema that say nothing about values.
_NOTES = {*("title", "description", "default", "examples", "deprecated", "$comment", "$schema"), "nullable"}
_DIGITS = {"integer": r"-?(0|[1-9][0-9]{0,17})", "number": r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?(e[-+]?[0-9]{1,2})?"}
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def call_grammar(vocabulary: Vocabulary, tools: Sequence[Mapping[str, Any]], form: Mapping[str, str]) -> Grammar:
    """Return the grammar of what stands between the marks of a call.

    Args:
        vocabulary: the bundle's.
        tools: objects of type `function`, each with a name and a JSON Schema of its parameters.
        form: the manifest's `tokens.parts.tool_call`.

    Raises:
        InputError: a tool has no name, its schema uses what calls in this syntax cannot be held to, or the bundle does
            not say how calls are written.
    """
    functions = [_function(tool) for tool in tools]
    syntax = form.get("syntax")
    if syntax == JSON:
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, parameters in functions
        ]
        return json_grammar(vocabulary, {"anyOf": calls, "x-guidance": {"whitespace_flexible": True}})
    if syntax != PAIRS:
        raise InputError("the bundle does not say how calls of tools are written, so they cannot be held to schemas")
    return Grammar(vocabulary, _Pairs(vocabulary, form).grammar(functions), "the schema of the tools")


def _function(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise InputError(f"a tool is {dict(tool)!r:.60}, expected an object with type function and a function's name")
    return name, function.get("parameters") or {"additionalProperties": False}


class _Pairs:
    """Writes the rules of a grammar in llguidance's form of Lark, for calls such as `NAME{KEY:VALUE,...}`."""

    def __init__(self, vocabulary: Vocabulary, form: Mapping[str, str]) -> None:
        self._before, self._after, quote = form.get("before", ""), form.get("after", ""), form.get("quote", "")
        token = vocabulary.special.get(quote)
        self._quote = _literal(quote) if token is None else f"<[{token}]>"
        # A text's end cannot be in it: a special token is no character.
        self._character = "(.|\\n)" if token is not None else f"[^{_in_class(quote[:1])}]"
        self._rules: dict[str, str] = {}

    def grammar(self, functions: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """The whole grammar, for tools with their names and parameters."""
        calls = []
        for name, parameters in functions:
            arguments = self._value({"type": "object", **parameters}, f"tool {name}: parameters")
            calls.append(f"{_literal(f'{self._before}{name}')} {arguments} {_literal(self._after)}")
        return "\n".join([f"start: {' | '.join(calls)}", *(f"{name}: {body}" for name, body in self._rules.items())])

    def _rule(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules[name] = body
        return name

    def _value(self, schema: Any, where: str) -> str:
        """The name of a rule for the values of a schema, which messages call `where`."""
        if schema is True or schema == {}:
            return self._any()
        if not isinstance(schema, Mapping):
            raise InputError(f"{where} is {json.dumps(schema):.40}, expected a JSON Schema")
        null = ['"null"'] if schema.get("nullable") is True else []
        return self._rule(" | ".join([*self._alternatives(schema, where), *null]))

    def _alternatives(self, schema: Mapping[str, Any], where: str) -> Iterator[str]:
        for key in ("enum", "const"):
            if key in schema:
                _refuse_others(schema, (key, "type"), where)
                yield from (self._constant(value, where) for value in (schema[key] if key == "enum" else [schema[key]]))
                return
        for key in ("anyOf", "oneOf"):
            if key in schema:
                _refuse_others(schema, (key,), where)
                yield from (self._value(part, f"{where}.{key}[{i}]") for i, part in enumerate(schema[key]))
                return
        named = schema.get("type", "object" if "properties" in schema else None)
        if named is None:
            _refuse_others(schema, (), where)
            yield self._any()
            return
        names = named if isinstance(named, list) else [named]
        for name in names:
            if not isinstance(name, str) or name.lower() not in _TYPES:
                raise InputError(f"{where}.type is {json.dumps(name):.40}, expected one of {', '.join(_TYPES)}")
        _refuse_others(schema, ("type", *(key for name in names for key in _TYPES[name.lower()][0])), where)
        for name in names:
            keywords, write = _TYPES[name.lower()]
            yield write(self, {key: schema[key] for key in keywords if key in schema}, where)

    def _any(self) -> str:
        """The name of a rule for all values."""
        if "any" not in self._rules:
            self._rules["any"] = ""  # it has itself inside
            one, numbers = '"true" | "false" | "null"', _number("number", {})
            self._rules["any"] = f"{one} | {numbers} | {self._text({}, '')} | {_array_of('any')} | {_object_of('any')}"
            self._rules["KEY"] = "/[A-Za-z_][A-Za-z_0-9-]*/"
        return "any"

    def _constant(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            return f"{self._quote} {_literal(value)} {self._quote}"
        if isinstance(value, Mapping | list):
            raise InputError(f"{where}: a constant is {json.dumps(value):.40}, expected a text, a number or null")
        return _literal(json.dumps(value))

    def _text(self, schema: Mapping[str, Any], where: str) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        regex = f"{self._character}{{{least},{most}}}"
        if "pattern" in schema:
            if least or most != "":
                raise InputError(f"{where} has a pattern and a length; leave one of them out")
            pattern, anything = str(schema["pattern"]), f"{self._character}*"
            ends = pattern.endswith("$") and not pattern.endswith("\\$")
            inner = pattern.removeprefix("^").removesuffix("$" if ends else "")
            regex = f"{'' if pattern.startswith('^') else anything}({inner}){'' if ends else anything}"
        name = f"T{len(self._rules)}"
        self._rules[name] = f"/{regex.replace('/', chr(92) + '/')}/"
        return f"{self._quote} {name} {self._quote}"

    def _array(self, schema: Mapping[str, Any], where: str) -> str:
        item = self._value(schema.get("items", {}), f"{where}.items")
        return _array_of(item, int(schema.get("minItems", 0)), schema.get("maxItems"))

    def _object(self, schema: Mapping[str, Any], where: str) -> str:
        """An object whose members come in the order of their names, as chat templates write them."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if unknown := [name for name in required if name not in properties]:
            raise InputError(f"{where}.required names {unknown[0]!r}, which properties do not have")
        others = schema.get("additionalProperties", not properties)
        if not properties and others is not False:
            self._any()
            return _object_of(self._value(others, f"{where}.additionalProperties"))
        # What may come from a member on: `first` where none came before it, `later` after others.
        first = later = self._rule('""')
        for name in sorted(properties, key=str.lower, reverse=True):
            member = f"{_literal(f'{name}:')} {self._value(properties[name], f'{where}.{name}')} {later}"
            absent = ("", "") if name in required else (f" | {first}", f" | {later}")
            first, later = self._rule(member + absent[0]), self._rule(f'"," {member}{absent[1]}')
        return f'"{{" {first} "}}"'


# By the name of a type: the keywords that it knows, and what writes its values.
_TYPES: dict[str, tuple[tuple[str, ...], Callable[[_Pairs, Mapping[str, Any], str], str]]] = {
    "string": (("minLength", "maxLength", "pattern"), _Pairs._text),
    "integer": (_NUMBERS, lambda _, schema, where: _number("integer", schema)),
    "number": (_NUMBERS, lambda _, schema, where: _number("number", schema)),
    "boolean": ((), lambda _, schema, where: '"true" | "false"'),
    "null": ((), lambda _, schema, where: '"null"'),
    "array": (("items", "minItems", "maxItems"), _Pairs._array),
    "object": (("properties", "required", "additionalProperties"), _Pairs._object),
}


def _refuse_others(schema: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse keywords that a grammar would not hold calls to."""
    for key in schema:
        if key not in known and key not in _NOTES:
            raise InputError(f"{where}.{key}: calls cannot be held to this keyword; leave it out, or strict tools")


def _number(name: str, schema: Mapping[str, Any]) -> str:
    # JSON's own numbers have any length, also such that no float64 holds them.
    return f"%json {json.dumps({'type': name, **schema})}" if schema else f"/{_DIGITS[name]}/"


def _array_of(item: str, least: int = 0, most: int | None = None) -> str:
    if most == 0:
        return '"[" "]"'
    more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else int(most) - 1}}}'
    return f'"[" {item} {more} "]"' + ("" if least else ' | "[" "]"')


def _object_of(value: str) -> str:
    return f'"{{" KEY ":" {value} ("," KEY ":" {value})* "}}" | "{{" "}}"'


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _in_class(character: str) -> str:
    return f"\\{character}" if character in "]\\^-" else character
