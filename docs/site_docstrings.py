"""An extension of griffe, which reads the docstrings for the site: from transformers' form to Markdown."""

import inspect
import itertools
import re
from collections.abc import Mapping
from typing import Any

import griffe


#: The sections of a docstring, as transformers has them, and what stands above them on the site.
SECTIONS = {"Args": "Parameters", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises", "Example": "Example"}
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):[ ]*$", re.MULTILINE)
#: `name (what it is):`, and the text under it.
ITEM = re.compile(r"^(?P<name>[\w.*]+)(?: \((?P<what>.*)\))?:(?: (?P<text>.*))?$")
#: [`name`] or [`~package.name`].
REFERENCE = re.compile(r"\[`(?P<tilde>~?)(?P<name>[\w.]+)`\](?![\[(])")
#: Libraries whose names are not looked up.
OTHERS = ("transformers.", "torch.", "datasets.", "peft.", "huggingface_hub.", "numpy.", "matplotlib.")
#: What pages of the reference show beside the public names.
ALSO_SHOWN = {
    "locality_config": ["LocalityFields"],
    "locality_mixin": ["LocalistGenerationMixin", "LocalistMixin"],
    "measurements": ["LocalityMeasurements"],
    "reach": ["Reach"],
}


class TransformersDocstrings(griffe.Extension):
    """Writes every docstring of the package anew, once all of it has been read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called by griffe for the whole package."""
        shown = show_public_names(pkg)
        for each in walk(pkg):
            if each.docstring is None and each.is_attribute:
                each.docstring = comment_of(each)
            if each.docstring is not None:
                each.docstring.value = as_markdown(each.docstring.value, shown)
        if missing := [public for _, public, thing in shown.values() if thing.docstring is None and public[0] != "_"]:
            raise ValueError(f"Public names without a docstring: {', '.join(missing)}.")
        for module, public, thing in shown.values():
            if thing.parent is not module:
                module.members[public] = griffe.Alias(public, thing, parent=module)


def walk(thing: griffe.Object) -> list[griffe.Object]:
    """A module or class with all that is defined in it."""
    own = [member for member in thing.members.values() if not member.is_alias]
    return [thing, *(each for member in own for each in walk(member))]


def show_public_names(package: griffe.Module) -> dict[str, tuple[griffe.Module, str, griffe.Object]]:
    """By its bare name, each public name of the package: the module it is public in, and what it is."""
    found: dict[str, tuple[griffe.Module, str, griffe.Object]] = {}
    for name in ("configuration", "page", "experiments", "hub", "trainers", "evaluation", ""):
        module = package.members[name] if name else package
        for public in map(str, module.exports or []):
            thing = module.members[public]
            # Of a function in a module of the same name, griffe has the module.
            thing = thing.members[public] if thing.is_module else thing
            found[public] = (module, public, thing.final_target if thing.is_alias else thing)
    for name, public_names in ALSO_SHOWN.items():
        module = package.members["modeling"].members[name]
        found |= {public: (module, public, module.members[public]) for public in public_names}
    return found


def comment_of(attribute: griffe.Object) -> griffe.Docstring | None:
    """What the comment above a constant, which begins with `#:`, says of it."""
    lines = attribute.lines_collection[attribute.filepath][: attribute.lineno - 1]
    comment = list(itertools.takewhile(lambda line: line.startswith("#: "), reversed(lines)))
    text = "\n".join(line.removeprefix("#: ") for line in reversed(comment))
    return griffe.Docstring(text, parent=attribute) if text else None


def as_markdown(text: str, shown: Mapping[str, tuple[griffe.Module, str, griffe.Object]]) -> str:
    """A docstring in transformers' form as Markdown: sections by bold titles, arguments as a list of definitions."""
    parts = SECTION.split(inspect.cleandoc(text))
    result = [parts[0].strip()]
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        # What is not indented any more is no part of the section.
        inside, rest = re.match(r"((?:\n|[ ]+[^\n]*(?:\n|$))*)(.*)", body.lstrip("\n"), re.DOTALL).groups()
        if name == "Example" and not inside.strip():  # its code block is not indented
            inside, rest = rest, ""
        lines = inspect.cleandoc("\n" + inside)
        result += [f"**{SECTIONS[name]}**", definitions(lines) if name in ("Args", "Raises") else lines, rest.strip()]
    return REFERENCE.sub(lambda found: link(found, shown), "\n\n".join(part for part in result if part))


def definitions(text: str) -> str:
    """Arguments or errors as a list of definitions; other text as it is."""
    items: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if found := ITEM.match(line):
            what = f" ({found['what']})" if found["what"] else ""
            items.append((f"`{found['name']}`{what}", [found["text"]] * bool(found["text"])))
        elif not items:
            return text
        else:
            items[-1][1].append(line.strip())
    return "\n\n".join(f"{head}\n:   " + "\n    ".join(body).strip() for head, body in items)


def link(found: re.Match[str], shown: Mapping[str, tuple[griffe.Module, str, griffe.Object]]) -> str:
    """A name in code, linked where the site shows it."""
    name = found["name"]
    text = name.rpartition(".")[2] if found["tilde"] else name
    public = next((part for part in name.split(".") if part in shown), None)
    if public is None or name.startswith(OTHERS):
        return f"`{text}`"
    return f"[`{text}`][{shown[public][0].path}.{public}]"
