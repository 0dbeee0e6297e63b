"""tasks/: examples before a question, samples that count, what each task is."""
import itertools
import re
from pathlib import Path

import pytest
from test_scoring import problem

import tasks
from configurator import UserError
from tasks import TASKS, Problem, few_shot, pass_at_k, score


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(200, 0, 100) == 0 and pass_at_k(200, 200, 1) == 1 and pass_at_k(10, 3,
                                                                                     1) == pytest.approx(0.3)


def test_examples_come_from_the_same_subject_and_never_from_the_problem_itself():
    examples = [Problem(f"Question: {i}\nAnswer:", f" {i}", "mmlu", subject="ab"[i % 2]) for i in range(6)]
    asked = examples[2]
    assert few_shot(asked, examples, 0) == asked.prompt
    assert few_shot(asked, examples, 1) == "Question: 0\nAnswer: 0\n\nQuestion: 2\nAnswer:"
    assert few_shot(asked, examples, 2) == "Question: 0\nAnswer: 0\n\nQuestion: 4\nAnswer: 4\n\nQuestion: 2\nAnswer:"
    other = asked._replace(subject="c", prompt="Question: x\nAnswer:")   # no example of its subject: any
    assert few_shot(other, examples,
                    2) == "Question: 0\nAnswer: 0\n\nQuestion: 1\nAnswer: 1\n\nQuestion: x\nAnswer:"


@pytest.mark.parametrize("k", [3, 8, 500])
def test_more_examples_than_there_are_is_an_error_that_names_the_most(k):
    """In silence, --shots=8 was --shots=5, and the results said 8."""
    examples = [Problem(f"Question: {i}\nAnswer:", f" {i}", "mmlu", subject="ab"[i % 2]) for i in range(6)]
    with pytest.raises(UserError, match=f"shots={k}, but .* 2 worked examples of the subject 'a' .*--shots=2 or fewer"):
        few_shot(examples[2], examples, k)
    with pytest.raises(UserError, match="shots=7, but .* 6 worked examples for a problem; use --shots=6"):
        few_shot(examples[2]._replace(prompt="x", subject="c"), examples, 7)


def test_every_task_of_the_mix_has_a_group():
    groups = dict(gsm8k="math", math="math", humaneval="code", mbpp="code", mmlu="knowledge",
                  mmlu_pro="knowledge")
    assert groups.items() <= {name: task.mix_group for name, task in TASKS.items()}.items()
    assert all(task.mix_group in tasks.GROUPS for task in TASKS.values() if task.mix_group)
    assert type(score(problem("#### 1"), "")) is tasks.Score


def test_no_file_outside_tasks_knows_a_task_by_name():
    """No text in the code of another folder is a task's name. A tokenizer is called arithmetic, an option mix."""
    known = "|".join(TASKS.keys() - {"arithmetic", "mix"})
    root = Path(tasks.__file__).parent.parent
    for path in [*root.glob("*.py"), *root.glob("bench/*.py"), *root.glob("plumbing/*.py")]:
        code = re.sub(r'r?"""(.|\n)*?"""|#.*', "", path.read_text())
        assert not re.findall(rf"""["']({known})["']""", code), path


def test_a_line_is_read_with_its_number_whatever_it_holds(tmp_path):
    (tmp_path / "x.jsonl").write_bytes("\ufeff{\"a\": \"\u2028\"}\r\n\n  \n[1]\n".encode())
    found = [(row, place[-7:]) for row, place in tasks.read_lines(tmp_path / "x.jsonl")]
    assert found == [({"a": "\u2028"}, " line 1"), ([1], " line 4")]
