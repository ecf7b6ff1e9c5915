"""YAML in which a key that stands twice is refused, of which PyYAML would keep the last without a word."""

from typing import Any

import yaml


class _UniqueKeys:
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a word"
            elif key.value in seen:
                problem = f"the key {key.value!r} stands there twice"
            if problem is not None:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class TextLoader(_UniqueKeys, yaml.BaseLoader):
    """Loads every value as the text that stands there."""


class TypedLoader(_UniqueKeys, yaml.SafeLoader):
    """
    Loads values as what YAML takes them for. A date, for which there is no use, is text; and so is what cannot be made
    what it looks like, such as a number of 5000 digits: it is refused under the name of its key.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """See `yaml`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError):
            if not isinstance(node, yaml.ScalarNode):
                raise
            return node.value


TypedLoader.add_constructor("tag:yaml.org,2002:timestamp", TypedLoader.construct_scalar)
