"""Laws of the mutation engine, over real code: modules of the standard library."""

from __future__ import annotations

import ast
import bisect
import configparser
import fnmatch
import inspect
import shlex
import statistics
import string
import textwrap
from collections import Counter
from types import ModuleType

import pytest

from configs.errors import InputError
from sandbox.mutate import (
    OPERATORS,
    REVERSIBLE,
    apply,
    can_be_undone,
    functions,
    inverse,
    mutations,
)

MODULES = [bisect, fnmatch, string, textwrap]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_mutation_compiles_stays_on_its_line_and_undoes(module: ModuleType) -> None:
    source = inspect.getsource(module)
    edits = mutations(source)
    assert len(edits) > 20
    before = source.split("\n")
    for edit in edits[:: 1 + len(edits) // 300]:
        mutant = apply(source, edit)
        compile(mutant, "mutant", "exec")
        after = mutant.split("\n")
        changed = [i + 1 for i in range(len(before)) if before[i] != after[i]]
        assert changed == [edit.line] == [edit.end_line]
        assert apply(mutant, inverse(edit)) == source
    assert len({(e.line, e.new) for e in edits}) == len(edits)
    assert edits == mutations(source)


def test_reversible_operators_meet_the_original_again() -> None:
    for module in [bisect, textwrap]:
        source = inspect.getsource(module)
        spans = functions(source)
        names = Counter(span.name for span in spans)
        for span in spans:
            if names[span.name] > 1 or "<locals>" in span.name:
                continue
            reversible = [e for e in mutations(source, span.name) if e.operator in REVERSIBLE]
            for edit in reversible[:: 1 + len(reversible) // 5]:
                again = {(e.line, e.new) for e in mutations(apply(source, edit), span.name)}
                assert (edit.line, edit.old) in again, edit


@pytest.mark.parametrize("module", [bisect, shlex])
def test_whether_a_bug_can_be_undone_is_told_by_its_function_alone(module: ModuleType) -> None:
    source = inspect.getsource(module)
    names = Counter(span.name for span in functions(source))
    for span in functions(source):
        if names[span.name] > 1 or "<locals>" in span.name:
            continue
        edits = mutations(source, span.name)
        for edit in edits[:: 1 + len(edits) // 3]:
            again = {(e.line, e.new) for e in mutations(apply(source, edit), span.name)}
            undone = edit.operator in REVERSIBLE or (edit.line, edit.old) in again
            assert can_be_undone(source, span, edit) == undone, edit


def test_every_operator_occurs_in_the_standard_library() -> None:
    modules = [*MODULES, shlex, statistics, configparser]
    seen = Counter(e.operator for module in modules for e in mutations(inspect.getsource(module)))
    assert set(seen) == set(OPERATORS) and len(OPERATORS) >= 12


@pytest.mark.parametrize(
    ("line", "mutant", "operator"),
    [
        ("return a < b", "return a <= b", "boundary"),
        ("return a not in b", "return a in b", "comparison"),
        ("return (a) + b", "return (a) - b", "arithmetic"),
        ("return a - b", "return b - a", "operands"),
        ("return (a and b)", "return (a or b)", "boolean"),
        ("if a and (b): pass", "if (b): pass", "condition"),
        ("if not a: pass", "if a: pass", "negation"),
        ("if (a or b): pass", "if not (a or b): pass", "negation"),
        ("return 10", "return 9", "constant"),
        ("return True", "return False", "constant"),
        ("return ''.join(a)", "return ' '.join(a)", "string"),
        ("return f(a)", "return f(b)", "variable"),
        ("return f('é', a)  # é", "return f(a, 'é')  # é", "arguments"),
        ("return a, b", "return b, a", "arguments"),
        ("if a: return b", "if a: pass", "early_exit"),
        ("if a: pass", "if a: return b", "early_exit"),
        ("return a[0]", "return a[-1]", "index"),
        ("return a[b:]", "return a[:b]", "index"),
        ("return a[b + 1]", "return a[b]", "off_by_one"),
        ("for i in range(a): pass", "for i in range(a - 1): pass", "off_by_one"),
        ("return a.lstrip()", "return a.rstrip()", "method"),
        ("a += b", "a -= b", "augmented"),
        ("a = b", "a += b", "augmented"),
        ("return a if b else f(a)", "return f(a) if b else a", "ternary"),
        ("return f(a)", "return None", "return_value"),
        ("raise KeyError(a)", "raise IndexError(a)", "exception"),
    ],
)
def test_operator_makes_this_edit(line: str, mutant: str, operator: str) -> None:
    source = f"def g(a, b):\n    {line}\n    f(a)\n"
    made = {(e.new.strip(), e.operator) for e in mutations(source, "g")}
    assert (mutant, operator) in made


def test_docstrings_annotations_decorators_and_fstrings_stay() -> None:
    source = (
        '@d(1)\ndef g(a: T[0], b=None) -> T[1]:\n    " "\n    x: T[2] = a\n    return f"{x + 1}"\n'
    )
    for edit in mutations(source, "g"):
        assert edit.line in (2, 4, 5)
        assert "T[" not in edit.new or edit.new.count("T[") == edit.old.count("T[")
        assert edit.line != 5 or edit.operator == "return_value"


def test_functions_names_and_lines() -> None:
    source = "class A:\n    @property\n    def f(self):\n        def g(): pass\n\ndef h(): pass\n"
    assert [(s.name, s.line, s.end_line) for s in functions(source)] == [
        ("A.f", 2, 4),
        ("A.f.<locals>.g", 4, 4),
        ("h", 6, 6),
    ]


def test_only_the_named_function_is_touched() -> None:
    source = inspect.getsource(textwrap)
    span = next(s for s in functions(source) if s.name == "TextWrapper._split")
    edits = mutations(source, "TextWrapper._split")
    assert edits and all(span.line <= e.line <= span.end_line for e in edits)


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="not valid Python"):
        mutations("def f(:\n")
    with pytest.raises(InputError, match="no function 'g'"):
        mutations("def f(): pass\n", "g")
    edit = mutations("def f(): return 1\n", "f")[0]
    with pytest.raises(InputError, match="does not fit"):
        apply("def f(): return 2\n", edit)


def test_crlf_source_keeps_its_line_ends() -> None:
    source = "def f(a):\r\n    return a < 1\r\n"
    for edit in mutations(source, "f"):
        assert apply(source, edit).count("\r\n") == 2
        ast.parse(apply(source, edit))
