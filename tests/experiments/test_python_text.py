from collections import Counter

from localist_hf.experiments.python_text import SHARES, part_of, python_reference, python_text, split_text


def test_a_files_part_depends_on_its_name_alone():
    # Changing these would let a model be measured on what a shipped base has seen.
    expected = {"abc.py": "base", "reference/with": "base", "json/decoder.py": "variants", "ast.py": "held-out"}
    assert {name: part_of(name) for name in expected} == expected
    names = [f"module_{number}.py" for number in range(10_000)]
    counts = Counter(map(part_of, names))
    assert all(abs(counts[part] / 100 - share) < 1.5 for part, share in SHARES.items())


def test_every_file_is_in_one_part_and_each_part_has_code_and_prose():
    texts = python_text()
    parts = split_text(texts)
    assert sum(map(len, parts.values())) == len(texts)
    assert all(parts[part] for part in SHARES)
    assert sum(map(len, texts.values())) > 5_000_000
    kinds = Counter((part_of(name), name.startswith("reference/")) for name in texts)
    assert all(kinds[part, is_reference] for part in SHARES for is_reference in (True, False))
    assert not any("/test" in name or name.startswith("pydoc_data") for name in texts)


def test_the_language_reference_is_there():
    topics = python_reference()
    assert len(topics) > 50
    assert sum(map(len, topics.values())) > 300_000
    assert "lambda" in topics["lambda"]
