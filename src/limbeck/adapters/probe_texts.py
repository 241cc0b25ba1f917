"""Texts on which the behaviour of an adapter is read."""

from __future__ import annotations

from limbeck.errors import AdapterError, did_you_mean

_TASK, _INPUT = "Please provide a response.", "Input."


def create_generic_probes() -> list[str]:
    """Five instruction templates with the same empty task, in the manner of Delta Activations (Xu et al. 2025).

    All end where an answer would begin.  The wording is ours; the published templates can be given as ``kind: texts``.
    """
    openings = (
        "The instruction below describes a task, and an input gives its context. Write a response that completes the task.",
        "You are given an instruction together with an input. Answer it as well as you can.",
        "Read the task and the text that belongs to it, then respond suitably.",
        "A task is stated below with additional input. Give the response that it asks for.",
        "What follows is a request and the material it is about. Reply to the request.",
    )
    return [f"{opening}\n\n### Instruction:\n{_TASK}\n\n### Input:\n{_INPUT}\n\n### Response:" for opening in openings]


DOMAINS: dict[str, list[str]] = {
    "math": [
        "Question: A train covers 60 miles in 1.5 hours. At what speed does it travel?\nAnswer:",
        "Solve for x: 3x + 7 = 22.\nSolution:",
        "Question: Anna has 14 apples, gives away 5 and buys 8 more. How many does she have now? Think step by step.\nAnswer:",
        "Compute the derivative of f(x) = x^3 - 4x.\nSolution:",
        "The sum of two numbers is 20 and their difference is 6. Find both.\nSolution:",
    ],
    "code": [
        "def is_prime(n):\n    \"\"\"Whether n is a prime number.\"\"\"\n",
        "# Read a CSV file and print the mean of its second column.\nimport csv\n\n",
        "class Stack:\n    \"\"\"A stack of integers with push, pop and peek.\"\"\"\n\n    def __init__(self):\n",
        "SELECT name, COUNT(*) AS orders FROM customers JOIN orders ON",
        "Write a function that reverses a linked list in place.\n\n```python\n",
    ],
    "commonsense": [
        "Question: Which of these would best keep soup warm: a paper cup, a metal bowl or a thermos flask?\nAnswer:",
        "The glass fell off the table because the cat pushed it. What broke?\nAnswer:",
        "Passage: Bees collect nectar and make honey from it.\nQuestion: Do bees make honey?\nAnswer (yes or no):",
        "To dry wet shoes overnight, one should\nA) fill them with newspaper\nB) put them into the refrigerator\nAnswer:",
        "Plants grow towards the window because they need",
    ],
}
"""Prompts of one domain each."""


def create_domain_probes(domain: str) -> list[str]:
    """Prompts of one domain: ``math``, ``code`` or ``commonsense``."""
    if domain not in DOMAINS:
        raise AdapterError(f"no domain {domain!r} of probes{did_you_mean(domain, DOMAINS) or ';'} domains: {', '.join(DOMAINS)}")
    return list(DOMAINS[domain])


DIVERSE = [
    "The river had risen in the night, and by morning the lower field was a brown lake in which the fence posts stood like reeds.",
    "def merge(left, right):\n    out = []\n    while left and right:\n        out.append(left.pop(0) if left[0] < right[0] else right.pop(0))\n",
    "Question: If a shirt costs 40 dollars and is sold at 15% off, what does one pay?\nAnswer: 15% of 40 is 6, and 40 - 6 = 34. The answer is 34.",
    '{"name": "pump", "id": 417, "tags": ["water", "steel"], "price": 89.5, "in_stock": true, "parts": [{"id": 3, "count": 2}]}',
    "ANTONIO. I hold the world but as it is, a stage where each man plays his part.\nGRATIANO. Then let mine be the fool's.",
    "Passage: The moon has no atmosphere to speak of, so its sky is black even by day.\nQuestion: Is the sky on the moon blue at noon?\nAnswer: no",
    "Theorem. The square root of 2 is irrational. Proof. Suppose that p/q is in lowest terms and p^2 = 2 q^2. Then p is even,",
    "Ingredients: 200 g flour, 3 eggs, 1/2 l milk, a pinch of salt.\n1. Whisk the eggs.\n2. Stir in the milk.\n3. Sift the flour over it.",
    "2024-03-07 11:42:09,331 WARNING worker-3 retrying request 8841 (attempt 2 of 5)\n2024-03-07 11:42:11,006 INFO worker-3 done in 1.6 s",
    "Dear Ms. Okafor,\n\nthank you for your letter of 12 May. We are pleased to confirm your booking for two nights.\n\nYours sincerely,\n",
    "Which material conducts electricity best?\nA) wood\nB) copper\nC) rubber\nD) glass\nAnswer: B",
    "import os\nimport sys\n\nclass Walker:\n    def __init__(self, root, follow=False):\n        self.root = root\n        self.follow = follow\n",
    "THE COMMITTEE SHALL MEET AT LEAST TWICE IN EACH CALENDAR YEAR AND SHALL KEEP MINUTES OF ITS PROCEEDINGS.",
    "Wer reitet so spät durch Nacht und Wind? Le ciel est bleu. El perro come pan. La casa è grande.",
    "| city | people | area |\n|---|---|---|\n| Oslo | 709,000 | 454 |\n| Turin | 841,000 | 130 |\n",
    "- Are you coming tonight?\n- I'd love to, but I've got to finish this first.\n- Ok, see you tomorrow then!",
]
"""Sixteen short texts of many kinds: what an adapter does to some of them, it does not do to others."""
