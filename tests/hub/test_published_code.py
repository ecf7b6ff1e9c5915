"""
Strangers run the code that travels with a model: its syntax trees show that it computes, and reaches no file, network
or process. Every name that it takes out of a module is on a list, and so is every place that looks up a name which no
tree shows.
"""

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from localist_hf import modeling
from localist_hf.hub.model_code import _ENTRIES, code_files


#: What may be taken out of a module, and no further attribute of it unless that is listed too.
_ALLOWED: Mapping[str, str] = {
    "collections.abc": "Callable Collection Iterator Mapping Sequence",
    "contextlib": "contextmanager nullcontext",
    "contextvars": "ContextVar",
    "copy": "deepcopy",
    "dataclasses": "dataclass field fields",
    "functools": "cache partial",
    "huggingface_hub.dataclasses": "strict",  # it checks fields; transformers makes its configurations by it
    "inspect": "Parameter Parameter.KEYWORD_ONLY Signature getdoc isclass signature",
    "math": "ceil floor inf log log1p log2 nan sqrt",
    "numbers": "Integral Real",
    "os": "PathLike",  # a type
    "re": "ASCII sub",
    "textwrap": "indent",
    "threading": "RLock",
    "torch": """
        BoolTensor LongTensor SymInt Tensor __version__ _assert_async addcmul arange autocast bmm bool cat
        contiguous_format device dtype empty empty_like finfo float16 float32 float64 full_like gather
        get_autocast_dtype is_autocast_enabled is_grad_enabled isin logaddexp long maximum minimum no_grad ones
        ones_like promote_types searchsorted stack tanh tensor where zeros zeros_like
    """,
    "torch.autograd": "Function",
    "torch.backends": "cuda.matmul mkldnn.matmul",
    "torch.backends.cuda": "SDPAParams can_use_efficient_attention can_use_flash_attention",
    "torch.compiler": "assume_constant_result disable is_compiling is_exporting",
    "torch.cuda": "get_device_name",
    "torch.jit": "is_tracing",
    "torch.library": "custom_op",
    "torch.linalg": "vector_norm",
    "torch.nn": "Module",
    "torch.nn.functional": "dropout pad scaled_dot_product_attention",
    "torch.ops.aten": """
        _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    """,
    "torch.utils.checkpoint": "checkpoint",
    "transformers": """
        AttentionInterface.register AttentionMaskInterface.register Cache DynamicCache EncoderDecoderCache GPT2Config
        GPT2Config.attn_pdrop GPT2LMHeadModel GPT2Model GenerationConfig GenerationMixin MODEL_FOR_CAUSAL_LM_MAPPING
        MODEL_MAPPING PreTrainedConfig PreTrainedModel PreTrainedModel.__init__ __version__
    """,
    "transformers.cache_utils": "CacheLayerMixin DynamicCache DynamicLayer DynamicSlidingWindowLayer",
    "transformers.integrations.sdpa_attention": "repeat_kv sdpa_attention_forward",
    "transformers.masking_utils": "eager_mask sdpa_mask",
    "transformers.modeling_outputs": "BaseModelOutputWithPastAndCrossAttentions CausalLMOutputWithCrossAttentions",
    "transformers.utils": "ModelOutput can_return_tuple",
    "transformers.utils.import_utils": "is_torch_greater_or_equal",
    "transformers.utils.logging": "get_logger",
    "types": "MethodType",
    "typing": "Any ClassVar NamedTuple TYPE_CHECKING get_args",
    "weakref": "finalize",
}
_NAMES = frozenset(f"{module}.{name}" for module, names in _ALLOWED.items() for name in names.split())
#: The modules on the way to them, which may stand before a dot only.
_MODULES = frozenset(name[: dot.start()] for name in _NAMES for dot in re.finditer(r"\.", name)) - _NAMES


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: The built-in names that may be used: they open, run and look up nothing by a name.
_BUILTINS = _words("""
    AttributeError RuntimeError ValueError all any bool classmethod dict enumerate float frozenset hasattr int
    isinstance issubclass iter len list map max min next object property range repr reversed set slice sorted
    staticmethod str sum super tuple type zip
""")
_OTHER_BUILTINS = frozenset([*dir(builtins), "exit", "help", "quit"]) - _BUILTINS
#: Names of Python's own that may be used, defined and written in a string.
_DUNDERS = _words("""
    __all__ __doc__ __enter__ __exit__ __init__ __init_subclass__ __name__ __package__ __post_init__ __qualname__
    __reduce__
""")

#: Expressions that are let through as they stand, in this function of this file only: by a name that no tree shows, or
#: by a name that is refused elsewhere.
_A_FIELD = "the names are fields of the class"
_PLACES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("configuration_localist_gpt2", "LocalistGPT2Config.from_dict"): {
        "cls.__dataclass_fields__": "the names of fields"
    },
    ("configuration_localist_gpt2", "LocalistGPT2Config.get_config_dict"): {
        "super().get_config_dict": "what it overrides, by which transformers itself reads a configuration"
    },
    ("fused_attention", "_choose_kernel"): {"hasattr(_aten, name)": "whether torch has these operators"},
    ("localist_attention", "eager_attention"): {
        "getattr(sys.modules[type(module).__module__], 'eager_attention_forward', None)": "one name of a model's file"
    },
    ("locality_config", "LocalityFields.validate_blocks"): {"getattr(self, name)": _A_FIELD},
    ("locality_config", "check_settings"): {"'`{}`'.format": "puts names in quotes"},
    ("locality_config", "settings_of"): {"getattr(config, name)": _A_FIELD},
    ("locality_mixin", "LocalistGenerationMixin.generate.said"): {
        "getattr(config, name, None)": "settings of a generation, which its callers write out"
    },
    ("locality_mixin", "LocalistMixin.__init_subclass__"): {
        "cls.__bases__": "which of them are models",
        "cls.__dict__": "whether the class itself names its output",
        "cls.output_class": "an annotation, which transformers reads",
        "forward.__signature__": "set, for transformers to read the arguments",
        "sys.modules[native_forward.__module__]": "the file of the native model",
        "vars(file)": "whether anything there counts positions",
    },
    ("locality_mixin", "LocalistMixin.forward"): {
        "getattr(outputs, self._cache_argument, None)": "one of the two names of the cache"
    },
    ("locality_mixin", "LocalistMixin.reach"): {"getattr(self.config, name, None)": "the names of `_NUM_EXPERTS`"},
    ("locality_mixin", "_localist_output"): {
        "'__module__'": "of a class of outputs: this file",
        "type(f'Localist{native.__name__}', (LocalityMeasurements, native), namespace)": "what stands above",
    },
    ("locality_mixin", "change_class"): {
        "cls.__new__(cls)": "an empty model, of which transformers notes what it can record",
        "functools.update_wrapper(model.forward, model._old_forward)": "as accelerate does it",
        "model.__class__": "set: what the function is for",
        "vars(model)": "whether accelerate has been there",
        "wrapped.__func__": "compared",
    },
    ("locality_request", "LocalityRequest.measured_layers"): {"getattr(self, name)": _A_FIELD},
    ("locality_request", "LocalityRequest.pointers"): {"getattr(self, other)": _A_FIELD},
    ("measurements", "LocalityMeasurements.__setattr__"): {
        "object.__setattr__": "what it overrides",
        "super().__setattr__": "what it overrides",
    },
    ("modeling_localist", "__getattr__"): {
        "getattr(transformers, name, None)": "refused below unless it is a model class"
    },
    ("modeling_localist", "_check_layers"): {
        "getattr(transformers, base.__name__, None)": "compared: whether a class is transformers' own"
    },
    ("modeling_localist", "_check_native"): {
        "getattr(transformers, native.__name__, None)": "compared: whether a class is transformers' own"
    },
    ("modeling_localist", "give_own_config"): {"vars(module)": "whether a module holds the configuration"},
    ("modeling_localist", "localist_class"): {
        "'__module__'": "of a class of models: this file",
        "type(native.__name__, bases, namespace)": "what stands above",
    },
    ("opaque_ops", "opaque_without_gradient.decorate.choose"): {
        "functools.wraps(function)": "which attributes it copies"
    },
    ("pointer_set", "PointerSet.of_rows"): {"getattr(self, name)": _A_FIELD},
    ("rules", "Rule.__post_init__"): {"getattr(self, name)": _A_FIELD},
    ("rules", "check_rules"): {"type(rule).__mro__": "the names of its classes"},
    ("rules", "pointers_of_rules"): {"getattr(rule, name)": _A_FIELD},
}

#: What an object is not asked for, whatever it is: a reader of names does not know. Modules, what reads and writes
#: files, what loads and runs code, and what Python keeps of functions, frames and classes.
_ATTRIBUTES = (frozenset(sys.stdlib_module_names) - {"select"}) | _words("""
    _C _dynamo _inductor addHandler ag_frame classes compile cpp_extension cr_frame distributed dynamic_module_utils
    f_back f_builtins f_globals f_locals format format_map from_file from_pretrained fromfile fspath get_config_dict
    gi_code gi_frame handlers hub import_utils manager memmap mro multiprocessing numpy package pipeline request
    requests serialization system tb_frame tb_next testing to_file to_folder to_json_file tofile torch transformers
    unlink urlopen
""")
_VERBS = re.compile(
    r"(dump|eval|exec|export|import|load|open|popen|push|read|run|save|spawn|upload|write)(s|_\w+)?"
    r"|\w+_(file|folder|hub|pretrained)"
)
_HARMLESS = frozenset(["_write_config", "save_for_backward"])  # a function of ours, and one that keeps tensors
#: By these arguments what is called evaluates strings, copies any attribute or loads others' code.
_ARGUMENTS = frozenset(["assigned", "custom_generate", "eval_str", "trust_remote_code", "updated"])

#: What annotations are made of, besides names and `|`.
_OF_TYPES = (ast.Attribute, ast.Constant, ast.List, ast.Subscript, ast.Tuple)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_refused(attribute: str) -> bool:
    if _is_dunder(attribute):
        return attribute not in _DUNDERS
    if attribute in _HARMLESS:
        return False
    bare = attribute.lstrip("_")
    return attribute in _ATTRIBUTES or bare in _ATTRIBUTES or bool(_VERBS.fullmatch(bare))


class _Reader(ast.NodeVisitor):
    """Collects what a published file may not do, by line, and what it uses of the lists."""

    def __init__(self, tree: ast.Module, file: str, siblings: Mapping[str, Collection[str]]) -> None:
        self.file, self.siblings = file, siblings
        self.where: list[str] = []  # the classes and functions around
        self.stands_for: dict[str, str] = {}  # what names of this file are in the modules that they come from
        self.known_types = _BUILTINS | {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self.found: list[str] = []
        self.used: set[str | tuple[str, str, str]] = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        # Not in a class, whose attribute it would be, nor where something else may have its name.
        top = [*tree.body, *(child for node in tree.body if isinstance(node, ast.If) for child in node.body)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if node not in top:
                    self.refuse(node, "imports within a class or a function")
                self._import(node)
        # `_aten = torch.ops.aten` is an import too.
        assigns = [node for node in tree.body if isinstance(node, ast.Assign)]
        self.aliases = [
            node for node in assigns if isinstance(node.value, ast.Attribute) and self._path(node.value) in _MODULES
        ]
        for node in self.aliases:
            self._bind(node, ast.unparse(node.targets[0]), self._path(node.value))
        # `Part = str | tuple[str, ...]` is a type where it is set once.
        names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        self.known_types -= set(names)
        for node in assigns:
            is_type = not any(
                isinstance(child, ast.Constant) and isinstance(child.value, str) for child in ast.walk(node)
            )
            if is_type and names.count(name := ast.unparse(node.targets[0])) == 1 and not self._no_type(node.value):
                self.known_types |= {name}
        self.visit(tree)

    def refuse(self, node: ast.AST, what: str) -> None:
        self.found.append(f"{self.file}, line {node.lineno}: {what}")

    def _bind(self, node: ast.AST, name: str, path: str) -> None:
        if not name.isidentifier() or self.stands_for.setdefault(name, path) != path:
            self.refuse(node, f"{name} is two things")

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            local = alias.asname or alias.name
            if isinstance(node, ast.Import):
                if alias.name not in _MODULES | {"sys"} or alias.asname or "." in alias.name:
                    self.refuse(node, f"imports {alias.name}" + f" as {alias.asname}" * bool(alias.asname))
                self._bind(node, local, alias.name)
            elif node.level:
                # What a file beside it has imported is not its to give: here nobody would know where it comes from.
                if node.level > 1 or alias.name not in self.siblings.get(node.module, ()):
                    self.refuse(node, f"imports {alias.name} from {'.' * node.level}{node.module or ''}")
                self.known_types |= {local}
            else:
                path = f"{node.module}.{alias.name}"
                if path not in _NAMES | _MODULES or node.module not in _ALLOWED:
                    self.refuse(node, f"imports {alias.name} from {node.module}")
                self._bind(node, local, path)

    def _path(self, node: ast.expr) -> str | None:
        """The dotted name of what is taken out of a module; `None` where no module is at its beginning."""
        if isinstance(node, ast.Name):
            return self.stands_for.get(node.id)
        of = self._path(node.value) if isinstance(node, ast.Attribute) else None
        return of and f"{of}.{node.attr}"

    def _check_path(self, node: ast.Name | ast.Attribute, path: str) -> None:
        if path not in _NAMES:
            self.refuse(node, f"uses {path}")
        elif not isinstance(node.ctx, ast.Load):
            self.refuse(node, f"sets {path}")
        self.used.add(path)

    def visit(self, node: ast.AST) -> None:
        function = ".".join(self.where)
        if isinstance(node, ast.expr) and (places := _PLACES.get((self.file, function))):
            text = ast.unparse(node)
            if text in places:
                self.used.add((self.file, function, text))
                return
        if isinstance(node, ast.MatchClass):
            self.refuse(node, "matches a class, which looks attributes up")
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                self._check_annotation(annotation)
        super().visit(node)

    def _no_type(self, node: ast.expr) -> str | None:
        """The first part of an expression by which it may be other than types and what they are put together of."""
        for child in ast.walk(node):
            if isinstance(child, ast.Name):
                is_type = child.id in self.known_types | self.stands_for.keys()
            elif isinstance(child, ast.BinOp):
                is_type = isinstance(child.op, ast.BitOr)
            else:
                is_type = isinstance(child, _OF_TYPES) or not isinstance(child, ast.expr)
            if not is_type:
                return ast.unparse(child)
        return None

    def _check_annotation(self, node: ast.expr) -> None:
        """Some of what is called evaluates annotations: a string there is code, and must not be made at run time."""
        is_place = ast.unparse(node) in _PLACES.get((self.file, ".".join(self.where)), ())
        if not is_place and (other := self._no_type(node)):
            self.refuse(node, f"is annotated with {other}, which may be a string")
        for child in ast.walk(node):
            if isinstance(child, ast.Constant) and isinstance(child.value, str):
                inner = ast.parse(child.value, mode="eval").body
                for part in ast.walk(inner):
                    ast.copy_location(part, child)
                self._check_annotation(inner)
                self.visit(inner)

    def _visit_scope(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if _is_refused(node.name) and (self.file, ".".join([*self.where, node.name])) not in _PLACES:
            self.refuse(node, f"defines {node.name}")
        self.where.append(node.name)
        self.generic_visit(node)
        self.where.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _visit_scope

    def visit_Assign(self, node: ast.Assign) -> None:
        if node not in self.aliases:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.stands_for:
            self._check_path(node, self.stands_for[node.id])
        elif node.id == "type":
            self.refuse(node, "uses type for more than to ask for a type, or to name it")  # it makes classes too
        elif node.id not in _DUNDERS if _is_dunder(node.id) else node.id in _OTHER_BUILTINS:
            self.refuse(node, f"uses {node.id}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if (path := self._path(node)) is not None:
            self._check_path(node, path)
            return
        if _is_refused(node.attr):
            self.refuse(node, f"uses {ast.unparse(node)}")
        self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if ast.unparse(node.value) == "type":
            self.visit(node.slice)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called, args = node.func.id if isinstance(node.func, ast.Name) else None, node.args
        if called == "getattr":
            name = args[1] if len(args) > 1 and not isinstance(args[0], ast.Starred) else None
            if not (isinstance(name, ast.Constant) and isinstance(name.value, str)) or _is_refused(name.value):
                self.refuse(node, f"looks up {ast.unparse(node)}")
        elif not (called == "type" and len(args) == 1 and not isinstance(args[0], ast.Starred)):
            self.visit(node.func)
        if called == "isinstance" and ast.unparse(args[-1]) == "type":
            args = args[:-1]
        for child in [*args, *node.keywords]:
            self.visit(child)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg in _ARGUMENTS:
            self.refuse(node, f"passes {node.arg}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        # What is looked up at the places above by names that stand elsewhere.
        if isinstance(node.value, str) and "_" in node.value and _is_refused(node.value):
            self.refuse(node, f"names {node.value!r}")


def read(source: str, file: str = "", siblings: Mapping[str, Collection[str]] = {}) -> _Reader:
    return _Reader(ast.parse(source), file, siblings)


def _defined(source: str) -> Iterator[str]:
    """The names that a file defines itself, and does not import."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        is_alias = names and isinstance(node.value, ast.Attribute)
        yield from () if is_alias else [*names, *([node.name] if hasattr(node, "name") else [])]


def published() -> dict[str, Path]:
    """Every file of code that is copied beside weights, by its name."""
    return {
        name: path for entry in _ENTRIES for name, path in code_files(Path(modeling.__file__).with_name(entry)).items()
    }


@pytest.fixture(scope="module")
def readers() -> dict[str, _Reader]:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in published().values()}
    siblings = {name: frozenset(_defined(source)) for name, source in sources.items()}
    sources["__init__"] = Path(modeling.__file__).read_text(encoding="utf-8")
    return {name: read(source, name, siblings) for name, source in sources.items()}


@pytest.mark.parametrize("name", [*published(), "__init__.py"])
def test_published_code_reaches_nothing_but_arithmetic(name: str, readers: dict[str, _Reader]) -> None:
    assert readers[name.removesuffix(".py")].found == []


def test_nothing_of_modeling_is_left_out() -> None:
    assert {path.name for path in Path(modeling.__file__).parent.glob("*.py")} == published().keys() | {"__init__.py"}


def test_the_lists_hold_no_more_than_is_used(readers: dict[str, _Reader]) -> None:
    used = set().union(*(reader.used for reader in readers.values()))
    places = {(*place, text) for place, texts in _PLACES.items() for text in texts}
    assert (_NAMES | _BUILTINS | places) - used == set()
    for names in _ALLOWED.values():
        assert names.split() == sorted(names.split())
    for listing in (_ALLOWED, _PLACES):
        assert list(listing) == sorted(listing)


def test_no_name_on_the_list_is_a_module() -> None:
    """From a module that stood there, every other could be reached."""
    for module, names in _ALLOWED.items():
        for name in names.split():
            first, *parts = f"{module}.{name}".split(".")
            found = importlib.import_module(first)
            for part in parts:
                found = getattr(found, part, None)  # an older torch lacks some kernels
            assert found is not None or module == "torch.ops.aten", f"{module}.{name}"
            assert not isinstance(found, ModuleType), f"{module}.{name}"


#: Each way around is tried after these lines, which are allowed: it is not seen for a module that is not imported.
_BEFORE = """
import functools
import inspect
import torch
import transformers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)
"""


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
        "torch.builtins.exec('x = 1')",
        "torch.builtins.open('weights')",
        "from torch import builtins as b\nb.open('weights')",
        "torch.os.listdir('/')",
        "import contextlib\ncontextlib.os.environ",
        "torch.ctypes.CDLL(None)",
        "torch.importlib.import_module('os')",
        "torch.utils.collect_env.run('ls')",
        "torch.__dict__['lo' + 'ad']",
        "g = getattr\ng(torch.nn, 'lo' + 'ad')",
        "getattr(torch.nn, 'lo' + 'ad')",
        "logging.logging.FileHandler('a')",
        "logging.os.getcwd()",
        "getattr(x, 'sys' + 'tem')",
        "getattr(*[torch, 'lo' + 'ad'])",
        "setattr(x, 'sys' + 'tem', f)",
        "list(map(getattr, [x], ['lo' + 'ad']))",
        "type.mro(int)[-1].__dict__['__subc' + 'lasses__']",
        "import sys\nclass A: pass\nA.__module__ = 'o' + 's'\nsys.modules[A.__module__]",
        "import sys\nclass A: pass\nsys.modules[A.__module__]",
        "torch.onnx.export(model, x, 'a')",
        "torch.profiler.profile().export_chrome_trace('a')",
        "profile.export_chrome_trace('a')",
        "torch.fx.symbolic_trace(model).to_folder('a')",
        "traced.to_folder('a')",
        "GPT2Config.get_config_dict('x')",
        "config.get_config_dict('x')",
        "T = torch\nT.load('weights')",
        "a, t = 1, torch.nn\nt.x",
        "t = torch.utils\nt.collect_env.run('ls')",
        "with torch as t: t.load('weights')",
        "for t in [torch]: t.load('weights')",
        "class A:\n    import torch\nA.torch.hub",
        "class A:\n    from torch import nn",
        "from .known import torch",
        "from torch import where as f\nfrom torch import tanh as f",
        "torch.where = f",
        "torch = x",
        "del torch.where",
        "match f:\n    case object(__globals__=g): g",
        "match f:\n    case object(a=g): g",
        "class A:\n    __match_args__ = ('__glo' + 'bals__',)",
        "'{0.__globals__[os].environ}'.format(f)",
        "str.format_map('{0.a}', f)",
        "functools.update_wrapper(x, f, ['__glo' + 'bals__'])",
        "@functools.wraps(f, assigned=['__glo' + 'bals__'])\ndef g(): pass",
        "functools.os",
        "inspect.signature(f, eval_str=True)",
        "class A:\n    x: \"__import__('os').system('ls')\" = 1",
        "def f(x: 'open(1)'): pass",
        "class A:\n    x: '__imp' + 'ort__(1)' = 1",
        "s = '__imp' + 'ort__(1)'\nclass A:\n    x: s = 1",
        "def f() -> f'__imp{1}': pass",
        "type('A', (), {'__annotations__': a})",
        "type('A', (), {'__module__': 'o' + 's'})",
        "x = vars(torch)",
        "vars(x)['lo' + 'ad']",
        "model.generate(x, custom_generate='me/code', trust_remote_code=True)",
        "tensor.numpy().dump('a')",
        "tensor.numpy().ctypes",
        "model.load_adapter('a')",
        "model.compile()",
        "error.__traceback__.tb_frame.f_back.f_builtins",
        "(x for x in y).gi_frame",
        "async def f():\n    coroutine.cr_frame",
        "print('x', file=f)",
        "class A:\n    def __del__(self): pass",
        "inspect.sys.modules",
        "transformers.utils.hub.cached_file('a', 'b')",
        "from transformers import AutoModel",
        "PreTrainedModel.from_pretrained('a')",
        "logger.handlers",
        "from __future__ import annotations",
        "lambda: __loader__.load_module('os')",
        "torch.Tensor.__subclasses__()",
        "torch.ops.aten.from_file('a')",
        "torch.from_file('a')",
        "torch.jit.load('a')",
        "torch.classes.load_library('a')",
        "config._get_config_dict('x')",
        "config._dict_from_json_file('a')",
        "path.open()",
        "type('A', (), {'__anno' + 'tations__': a})",
        "t = type\nt('A', (), {'__anno' + 'tations__': a})",
        "type(*['A', (), {'__anno' + 'tations__': a}])",
        "type.__setattr__(A, '__mod' + 'ule__', 'os')",
        "model.__getattr__('lo' + 'ad')",
        "torch.nn.functional.pad.__globals__",
        "torch.nn.functional.math",
        "F.torch",
        "(lambda module: module)(torch)",
        "len.__self__",
        "def f(module=F): pass",
    ],
)
def test_what_reaches_further_is_seen(source: str) -> None:
    assert read(_BEFORE + source, "known", {"known": {"Shares"}}).found != []


def test_what_computes_is_not_refused() -> None:
    source = """
import math
import torch
from torch import nn
from .known import Shares

class Layer(nn.Module):
    def forward(self, query):
        return torch.tanh(query) * math.inf + getattr(self, "scale", 1.0)
"""
    assert read(source, "known", {"known": {"Shares"}}).found == []
    assert read(_BEFORE).found == []
