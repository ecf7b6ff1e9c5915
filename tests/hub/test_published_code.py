"""
Strangers run the code that travels with a model: its syntax trees show that it computes, and reaches no file, network
or process. What a tree cannot show, such as a name put together at run time, is not allowed at all.
"""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from localist_hf import modeling
from localist_hf.hub.model_code import _ENTRIES, code_files


_ANY = None
#: What may be imported of modules that are not siblings: these names, or any.
_ALLOWED: dict[str, Collection[str] | None] = {
    # Arithmetic, containers, types and their like, of the standard library.
    "collections.abc": _ANY,
    "contextlib": _ANY,
    "contextvars": ("ContextVar",),
    "copy": ("copy", "deepcopy"),
    "dataclasses": ("dataclass", "field", "fields"),
    "functools": _ANY,
    "inspect": ("Parameter", "Signature", "getdoc", "isclass", "signature"),
    "math": _ANY,
    "numbers": _ANY,
    "os": ("PathLike",),  # a type
    "re": _ANY,
    "sys": ("modules",),  # for the module of a class only: see below
    "textwrap": _ANY,
    "threading": ("RLock",),
    "types": ("MethodType",),
    "typing": ("TYPE_CHECKING", "Any", "ClassVar", "NamedTuple", "get_args"),
    "weakref": ("finalize",),
    # A decorator that checks fields, which transformers has its configurations from.
    "huggingface_hub.dataclasses": ("strict",),
    "torch": _ANY,
    "torch.nn": _ANY,
    "torch.nn.functional": _ANY,
    "torch.utils.checkpoint": ("checkpoint",),
    "transformers": _ANY,
    "transformers.cache_utils": _ANY,
    "transformers.integrations.sdpa_attention": _ANY,
    "transformers.masking_utils": ("eager_mask", "sdpa_mask"),
    "transformers.modeling_outputs": _ANY,
    "transformers.utils": ("ModelOutput", "can_return_tuple", "logging"),
    "transformers.utils.import_utils": ("is_torch_greater_or_equal",),
}
#: Built-in functions that run, read or look up what no tree shows.
_BUILTINS = frozenset((
    "__builtins__", "__import__", "__loader__", "__spec__", "breakpoint", "compile", "delattr", "eval", "exec",
    "exit", "globals", "help", "input", "locals", "memoryview", "open", "quit",
))  # fmt: skip
#: By which torch, transformers and what Python keeps of its objects get there, whatever they are looked up in.
_ATTRIBUTES = frozenset((
    "__base__", "__builtins__", "__closure__", "__code__", "__getattribute__", "__globals__", "__import__",
    "__loader__", "__spec__", "__subclasses__", "_C", "_dynamo", "_inductor", "cpp_extension", "classes",
    "distributed", "dlpack", "dynamic_module_utils", "f_builtins", "f_globals", "f_locals", "from_file",
    "from_pretrained", "fromfile", "fspath", "gi_frame", "hub", "import_module", "import_utils", "load",
    "load_library", "load_state_dict_from_url", "load_url", "loads", "memmap", "multiprocessing", "package",
    "pickle", "pipeline", "popen", "push_to_hub", "read_bytes", "read_text", "request", "requests", "run_path",
    "save", "save_pretrained", "serialization", "spawn", "subprocess", "system", "tb_frame", "testing",
    "to_json_file", "to_file", "tofile", "unlink", "upload_folder", "urlopen", "write_bytes", "write_text",
))  # fmt: skip
#: Whose attributes may not be looked up by a name that is made at run time, but for `getattr(transformers, name)`,
#: which `localist_class` does to find a model class.
_MODULES = frozenset(name.partition(".")[0] for name in _ALLOWED) | {"F", "nn"}


class _Reader(ast.NodeVisitor):
    """Collects what a published file may not do, by line."""

    def __init__(self, siblings: Collection[str]) -> None:
        self.siblings = siblings
        self.found: list[str] = []

    def refuse(self, node: ast.AST, what: str) -> None:
        self.found.append(f"line {node.lineno}: {what}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name not in _ALLOWED or alias.asname or "." in alias.name:
                self.refuse(node, f"imports {alias.name}" + f" as {alias.asname}" * bool(alias.asname))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            if node.level > 1 or node.module not in self.siblings:
                self.refuse(node, f"imports {'.' * node.level}{node.module or ''}, which is no file beside it")
            return
        allowed = _ALLOWED.get(node.module, ())
        for alias in node.names:
            is_allowed = allowed is _ANY or alias.name in allowed
            # Its functions load, download and run; classes and mappings begin with a capital.
            is_allowed &= node.module != "transformers" or alias.name[:1].isupper()
            if not is_allowed or alias.name == "*" or alias.name in _ATTRIBUTES | _BUILTINS or alias.name == "sys":
                self.refuse(node, f"imports {alias.name} from {node.module}")
            elif node.module == "sys":
                self.refuse(node, "imports from sys, whose modules are everything")

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in _BUILTINS:
            self.refuse(node, f"uses {node.id}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        of = node.value.id if isinstance(node.value, ast.Name) else None
        if node.attr in _ATTRIBUTES or (of, node.attr) == ("sys", "modules"):
            self.refuse(node, f"uses {ast.unparse(node)}")
        allowed = _ALLOWED.get(of, _ANY)
        if allowed is not _ANY and node.attr not in allowed:
            self.refuse(node, f"uses {of}.{node.attr}")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if ast.unparse(node.value) == "sys.modules":
            if not (isinstance(node.slice, ast.Attribute) and node.slice.attr == "__module__"):
                self.refuse(node, f"looks for the module {ast.unparse(node.slice)}, which is no class's")
            self.visit(node.slice)
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value in _BUILTINS | {name for name in _ATTRIBUTES if "_" in name}:
            self.refuse(node, f"names {node.value!r}")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "setattr"):
            of, what = map(ast.unparse, node.args[:2])
            is_constant = isinstance(node.args[1], ast.Constant)
            if is_constant and node.args[1].value in _ATTRIBUTES:
                self.refuse(node, f"looks for {what}")
            if of.partition(".")[0] in _MODULES - {"transformers"} and not of.startswith("sys.modules["):
                self.refuse(node, f"looks for {what} in {of}")
            if of == "transformers" and not is_constant and what not in ("name", "base.__name__", "native.__name__"):
                self.refuse(node, f"looks for {what} in transformers")
            if of.startswith("sys.modules[") and what != "'eager_attention_forward'":
                self.refuse(node, f"looks for {what} in {of}")
        self.generic_visit(node)


def _aliases(tree: ast.Module) -> Iterator[str]:
    """Names that stand for a module under which it could be looked into without being seen."""
    for node in ast.walk(tree):
        values = [node.value] if isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign | ast.Return) else []
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
                values = values[1:]
        for value in values:
            if isinstance(value, ast.Name) and value.id in _ALLOWED | {"F": None, "nn": None}:
                yield f"line {node.lineno}: hands the module {value.id} on"


def violations(source: str, siblings: Collection[str] = ()) -> list[str]:
    """What a published file must not do, and does."""
    tree, reader = ast.parse(source), _Reader(siblings)
    reader.visit(tree)
    return [*reader.found, *_aliases(tree)]


def published() -> dict[str, Path]:
    """Every file of code that is copied beside weights, by its name."""
    return {
        name: path for entry in _ENTRIES for name, path in code_files(Path(modeling.__file__).with_name(entry)).items()
    }


@pytest.mark.parametrize("name", published())
def test_published_code_reaches_nothing_but_arithmetic(name: str) -> None:
    siblings = {other.removesuffix(".py") for other in published()}
    assert violations(published()[name].read_text(encoding="utf-8"), siblings) == []


def test_nothing_of_modeling_is_left_out() -> None:
    assert {path.name for path in Path(modeling.__file__).parent.glob("*.py")} == published().keys() | {"__init__.py"}
    assert violations(Path(modeling.__file__).read_text(encoding="utf-8"), {n[:-3] for n in published()}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.system('ls')",
        "import os\nos.environ['HOME']",
        "from os import environ",
        "import os as types",
        "import subprocess",
        "def later():\n    import socket",
        "import urllib.request",
        "import pickle",
        "from pickle import loads",
        "import importlib",
        "import torch.hub",
        "from torch import load",
        "from torch import hub",
        "import torch as t",
        "from torch import *",
        "from .. import hub",
        "from . import anything",
        "from .unknown import name",
        "from localist_hf import localize",
        "from huggingface_hub import hf_hub_download",
        "from transformers import pipeline",
        "from transformers.utils import cached_file",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "open('weights')",
        "from pathlib import Path",
        "eval('1')",
        "exec('x = 1')",
        "run = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "globals()['x']",
        "__builtins__['eval']",
        "vars()['__builtins__']",
        "torch.load('weights')",
        "torch.save(x, 'weights')",
        "torch.hub.load('a', 'b')",
        "torch.utils.cpp_extension.load_inline('a', 'b')",
        "torch.ops.load_library('a.so')",
        "torch.Tensor.from_file('a')",
        "tensor.numpy().tofile('a')",
        "GPT2Model.from_pretrained('gpt2')",
        "self.save_pretrained('folder')",
        "self.push_to_hub('me/model')",
        "import sys\nsys.modules['os'].system('ls')",
        "import sys\nsys.modules.get('os')",
        "import sys\nfound = sys.modules",
        "import sys\nname = 'os'\nsys.modules[name]",
        "from sys import modules",
        "import sys\nsys.path.append('.')",
        "import sys\ngetattr(sys, 'modules')",
        "import sys\ngetattr(sys.modules[type(x).__module__], 'os')",
        "getattr(torch, 'load')('a')",
        "getattr(torch, 'lo' + 'ad')('a')",
        "getattr(transformers, 'pipe' + 'line')",
        "getattr(model, 'from_pretrained')('gpt2')",
        "import torch\nt = torch",
        "import torch\nreach(torch)",
        "().__class__.__base__.__subclasses__()",
        "function.__globals__['os']",
        "function.__code__",
        "import inspect\ninspect.currentframe().f_back",
        "import types\ntypes.FunctionType(code, {})",
        "from typing import get_type_hints",
        "from dataclasses import make_dataclass",
        "import threading\nthreading.Thread(target=f).start()",
    ],
)
def test_what_reaches_further_is_seen(source: str) -> None:
    assert violations(source, ["known"]) != []


def test_what_computes_is_not_refused() -> None:
    source = """
import math
import torch
from torch import nn
from .known import Shares

class Layer(nn.Module):
    def forward(self, query):
        return torch.softmax(query, -1) * math.pi + getattr(self, "scale", 1.0)
"""
    assert violations(source, ["known"]) == []
