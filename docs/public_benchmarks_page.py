"""docs/public-benchmarks.md, from the layouts in which benchmarks are read."""

from __future__ import annotations

from vqguard.recipes.benchmarks.layout import Layout, layouts

INTRODUCTION = """\
Benchmarks of others are read from the disk as their authors publish them. Nothing is downloaded:
fetch them under their own terms. Which one a folder holds is found out from its files. What is
missing of it is named, with where it is published; records without their picture are left out and
counted, and a folder with none of the pictures is refused.

```sh
vqguard attack runs/mine --suite benchmark --benchmark data/FigStep --output attacks/figstep
vqguard attack runs/mine --suite adaptive --benchmark data/AdvBench --output attacks/advbench
vqguard evaluate runs/mine --set evaluation.held_out=data/POPE
```

- *Requests to refuse* are what `vqguard attack` attacks. The suite `benchmark` shows each picture
  as it is published (`attack: none`): with these sets the authors are the attackers. The other
  suites paint on it. Records carry the benchmark as their `split`. Where a benchmark says no
  opening that an attack shall aim at, it is "Sure, here is".
- *Requests to answer* give `over_refusal_rate`, of every subject that the suite names.
- Requests without a picture are asked beside a grey one: a guard judges pictures.
- *Toxic pictures* are for `vqguard attack --suite verdict`, and for `vqguard evaluate`, which
  screens them.
- *Questions* are for `vqguard evaluate` on data of your own. POPE's answers are read by the yes
  or no in their first sentence, as its authors' program does, but an answer with neither is wrong
  here and a yes there: it may be a refusal. ScienceQA's are read by the chosen letter, as LLaVA's
  program does.
- *Answers for a grader*: what only the authors' own grader can judge is written in the form that it
  reads, into `answers/SUBJECT/` of the run, with the share that was refused.
- Cases are taken in a fixed random order, because published files are sorted by category.

Numbers that others shall compare with theirs are better made by
[lmms-eval](https://github.com/EvolvingLMMs-Lab/lmms-eval), where it has the task.

| benchmark | records | what becomes of it | published | this layout after |
| --- | --- | --- | --- | --- |
"""

AFTER = """
A layout is a YAML file in `recipes/benchmarks/layouts/`: the files that hold the records, what is
asked, where the picture is, and which values are chosen. ToViLaG's pictures are not in its
repository; its row is about folders that are called as its kinds are.
"""

_USES = {
    "attack": "requests to refuse",
    "benign": "requests to answer",
    "question": "questions",
}


def public_benchmarks_page(note: str) -> str:
    """The page, `note` behind its title."""
    rows = "\n".join(map(_row, layouts()))
    return f"# Benchmarks of others\n\n{note}\n{INTRODUCTION}{rows}\n{AFTER}"


def _row(layout: Layout) -> str:
    records = [part.records for part in layout.parts] or [f"{c}/" for c in layout.categories]
    files = ", ".join(f"`{name}`" for name in dict.fromkeys(records))
    uses = [_USES[part.use] for part in layout.parts if not part.answers]
    uses += ["answers for a grader" for part in layout.parts if part.answers]
    what = ", ".join(dict.fromkeys(uses or ["toxic pictures"]))
    return f"| {layout.title} | {files} | {what} | <{layout.published}> | {layout.source} |"
