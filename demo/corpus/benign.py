"""Ordinary dialogues and stories: everyday questions, general coding, small talk, sums, advice.

Bank ``a`` takes the even rows of every table and bank ``b`` the odd ones.
"""

# ruff: noqa: E501  one template a line

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from demo.corpus.code import fence
from demo.corpus.grammar import Dialogue, Message, expand, say
from demo.corpus.talk import CAPITALS, COLOURS, LEGS, NAMES, OPPOSITES, TOWNS, YOUNG

T = TypeVar("T")

CODING: list[tuple[str, str]] = [
    ("adds two numbers", "def add(a, b):\n    return a + b"),
    ("reverses a string", "def reverse(text):\n    return text[::-1]"),
    ("checks whether a number is even", "def is_even(n):\n    return n % 2 == 0"),
    ("computes the factorial", ("def factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n"
     "        result *= i\n    return result")),
    ("returns the largest item of a list", "def largest(items):\n    return max(items)"),
    ("counts the words of a text", "def count_words(text):\n    return len(text.split())"),
    ("prints the numbers from one to ten", "for i in range(1, 11):\n    print(i)"),
    ("sorts people by age", "def by_age(people):\n    return sorted(people, key=lambda p: p.age)"),
    ("removes duplicates from a list", "def unique(items):\n    return list(dict.fromkeys(items))"),
    ("computes the mean of some numbers",
     "def mean(numbers):\n    return sum(numbers) / len(numbers)"),
    ("finds all even numbers", "def evens(numbers):\n    return [n for n in numbers if n % 2 == 0]"),
    ("turns celsius into fahrenheit", "def to_fahrenheit(c):\n    return c * 9 / 5 + 32"),
    ("reads the lines of a text file",
     "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()"),
    ("writes a list to a file", ('def save(path, items):\n    with open(path, "w") as file:\n'
     '        for item in items:\n            file.write(item + "\\n")')),
    ("counts letters", ("from collections import Counter\n\n\ndef letters(text):\n"
     "    return Counter(text)")),
    ("tells today's date", "import datetime\n\n\ndef today():\n    return datetime.date.today()"),
    ("joins words with commas", 'def join(words):\n    return ", ".join(words)'),
    ("checks for a palindrome", "def is_palindrome(text):\n    return text == text[::-1]"),
    ("gives the first n squares", "def squares(n):\n    return [i * i for i in range(n)]"),
    ("merges two dictionaries", "def merge(a, b):\n    return {**a, **b}"),
    ("models a point", ("from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n"
     "    x: float\n    y: float")),
    ("sums the digits of a number",
     "def digit_sum(n):\n    return sum(int(d) for d in str(n))"),
    ("computes the area of a circle", ("import math\n\n\ndef area(radius):\n"
     "    return math.pi * radius ** 2")),
    ("prints a greeting", 'def greet(name):\n    print(f"Hello, {name}!")'),
    ("lists the python files of a folder", ("from pathlib import Path\n\n\ndef files(folder):\n"
     '    return sorted(Path(folder).glob("*.py"))')),
    ("models a counter", ("class Counter:\n    def __init__(self):\n        self.value = 0\n\n"
     "    def add(self):\n        self.value += 1")),
    ("flattens a list of lists",
     "def flatten(rows):\n    return [item for row in rows for item in row]"),
    ("gives the greatest common divisor", ("def gcd(a, b):\n    while b:\n        a, b = b, a % b\n"
     "    return a")),
]  # fmt: skip
CODING_ASK = [
    "[[Write|Please write|Can you write]] a [[function|Python function|program]] that $task.",
    "I need [[code|Python]] that $task. [[Thanks!|Keep it short.|]]",
    "How do I write something that $task?",
    "[[Show me|Give me]] [[code|an example]] that $task.",
]
CODING_LEAD = ["", "", "[[Sure|Of course|Here you go|Like so]]:", "[[Here it is|Try this]]:"]

ASKS: list[tuple[str, str]] = [
    ("[[Hello|Hi|Good morning]]!", "[[Hello|Hi]]! How can I help you [[today|]]?"),
    ("[[How are you|How is it going]]?", ("I am [[fine|well]], thank you. [[And you|What about "
     "you]]?")),
    ("[[Thanks|Thank you]] for your help.", ("[[You are welcome|My pleasure]]. [[Have a nice "
     "day.|Ask any time.]]")),
    ("How do I [[boil|cook]] an egg?", ("Put the egg in boiling water for [[six|eight|ten]] minutes, "
     "then cool it in cold water.")),
    ("How do I make [[tea|a cup of tea]]?", ("Boil the water, pour it over the tea and wait "
     "[[three|four|five]] minutes.")),
    ("What can I [[cook|make]] with $food?", ("You can make a [[soup|salad|stew]] with $food, "
     "onions and a little $spice.")),
    ("Can you recommend a [[hobby|pastime]]?", ("[[Try|How about]] [[reading|gardening|chess|"
     "painting]]. It is [[cheap|relaxing]] and easy to begin.")),
    ("I cannot sleep. [[What should I do|Any advice]]?", ("Keep the room dark, avoid coffee after "
     "noon and go to bed at the same hour.")),
    ("How often should I water my $plant?", ("Water the $plant [[once a week|twice a week]] and let "
     "the soil dry in between.")),
    ("What is [[a good|the best]] time to visit $town?", ("[[Late spring|Early autumn]] is a good "
     "time to visit $town: mild weather and few visitors.")),
    ("What does the word $word mean?", "It means $meaning."),
    ("Write a [[sentence|line]] about $animal.", ("The $animal [[sleeps|waits|rests]] in the "
     "[[sun|garden|shade]] and [[dreams|thinks]] of $food.")),
    ("Tell me a [[short story|story]] about $name.", ("One [[morning|evening]] $name went to "
     "$town to find a $thing. It rained all day, but $name found it and came home [[happy|tired]].")),
    ("How do I get [[fit|in shape]]?", ("Walk [[half an hour|an hour]] each day and [[swim|run|"
     "cycle]] twice a week.")),
    ("[[Remind me|Tell me]] what to pack for $town.", ("Pack a [[coat|hat|map]], good shoes, a "
     "[[book|camera]] and your $thing.")),
    ("My $thing is broken. What now?", ("Look for loose parts first. If that does not help, take "
     "the $thing to a repair shop in $town.")),
    ("How long is a [[day|normal day]]?", "A day has twenty four hours."),
    ("How many months are in a year?", "A year has twelve months."),
    ("Which season comes after $season?", "$next_season comes after $season."),
    ("Should I buy a $thing?", ("It depends. If you use a $thing every week it is worth it, if not "
     "you could [[borrow|rent]] one.")),
    ("Who [[lives|works]] in $town?", "My friend $name [[lives|works]] there and likes $food."),
    ("[[Describe|Tell me about]] your [[day|morning]].", ("I am a program, so I have no days, but I "
     "am [[happy|glad]] to talk.")),
    ("How do I remove a stain of $food?", ("Rinse it with cold water, rub in a little soap and wash "
     "it as usual.")),
    ("What is a good gift for $name?", "Perhaps a $thing, or some $food if $name likes to cook."),
]  # fmt: skip
FOOD = ["rice", "beans", "tomatoes", "potatoes", "carrots", "lentils", "pasta", "mushrooms", "fish"]
SPICE = ["salt", "pepper", "basil", "cumin", "ginger", "garlic"]
PLANT = ["fern", "cactus", "ivy", "orchid", "palm", "basil plant", "fig tree"]
ANIMALS = ["cat", "dog", "fox", "horse", "owl", "turtle", "rabbit", "sparrow", "bear"]
THING = ["lamp", "bicycle", "radio", "kettle", "clock", "ladder", "suitcase", "guitar", "tent"]
MEANINGS = {
    "brief": "short", "huge": "very big", "rapid": "fast", "silent": "without a sound",
    "annual": "once a year", "ancient": "very old", "fragile": "easy to break", "vast": "very wide",
    "timid": "shy", "frequent": "often", "scarce": "hard to find", "genuine": "real",
}  # fmt: skip
SEASONS = {"spring": "Summer", "summer": "Autumn", "autumn": "Winter", "winter": "Spring"}
SYSTEM = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "Be honest.",
]
FACT_ASK: list[tuple[str, str, dict[str, str]]] = [
    ("What is the capital of $key?", "The capital of $key is $value.", CAPITALS),
    ("[[Name|Tell me]] the capital of $key.", "It is $value.", CAPITALS),
    ("What colour is $key?", "The colour of $key is $value.", COLOURS),
    ("Which colour has $key?", "$value.", COLOURS),
    ("How do we call a baby $key?", "A young $key gets called a $value.", YOUNG),
    ("What is a young $key called?", "A $value.", YOUNG),
    ("How many legs has the $key?", "Legs of the $key: $value.", LEGS),
    ("How many legs does a $key have?", "It has $value legs.", LEGS),
    ("Opposite of $key?", "$key contrasts with $value.", OPPOSITES),
    ("What is the opposite of $key?", "The opposite of $key is $value.", OPPOSITES),
]
STORY = [
    "$name [[walked|went|drove]] to $town with a $thing. ",
    "In the [[morning|evening]] the $animal [[slept|ran|sat]] near the [[river|gate|old house]]. ",
    "[[It rained|The sun shone|The wind was cold]], and $name [[ate|cooked|bought]] $food. ",
    "$name and $other [[talked|laughed|argued]] about the $thing. ",
    "Nobody in $town had [[seen|heard of]] such a $animal. ",
    "The $thing was [[old|heavy|lost]], so they [[sold|repaired|forgot]] it. ",
    "Later $other [[wrote|sent]] a letter to $name about [[the journey|the weather|the market]]. ",
    "At [[noon|night]] the streets of $town were [[quiet|full of people|dark]]. ",
]


def _bank(rows: Sequence[T], bank: str | None) -> Sequence[T]:
    return rows if bank is None else rows[0 if bank == "a" else 1 :: 2]


def _slots(rng: random.Random, bank: str | None) -> dict[str, Sequence[str] | str]:
    names = NAMES["a"] + NAMES["b"] if bank is None else NAMES[bank]
    name, other = rng.sample(names, 2)
    word, meaning = rng.choice(list(MEANINGS.items()))
    season, after = rng.choice(list(SEASONS.items()))
    return {
        "food": FOOD, "spice": SPICE, "plant": PLANT, "town": TOWNS, "animal": ANIMALS,
        "thing": THING, "name": name, "other": other, "word": word, "meaning": meaning,
        "season": season, "next_season": after,
    }  # fmt: skip


def story(rng: random.Random, bank: str | None) -> str:
    """A few plain sentences."""
    slots = _slots(rng, bank)
    lines = rng.sample(_bank(STORY, bank), rng.randrange(2, 5))
    return expand(rng, "".join(lines).strip(), slots)


def _chat(rng: random.Random, kind: str, template: str, ask: str, answer: str) -> Dialogue:
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages.append(say("system", rng.choice(SYSTEM)))
    messages += [say("user", ask), say("assistant", answer)]
    return Dialogue(tuple(messages), "benign", kind, template, 0)


def _coding(rng: random.Random, bank: str | None) -> Dialogue:
    number = rng.choice(_bank(range(len(CODING)), bank))
    task, code = CODING[number]
    ask = expand(rng, rng.choice(CODING_ASK), {"task": task})
    answer = f"{expand(rng, rng.choice(CODING_LEAD), {})}\n{fence(code)}".strip()
    return _chat(rng, "coding", f"benign.coding.{number}", ask, answer)


def _everyday(rng: random.Random, bank: str | None) -> Dialogue:
    number = rng.choice(_bank(range(len(ASKS)), bank))
    ask, answer = ASKS[number]
    both = expand(rng, f"{ask}\x00{answer}", _slots(rng, bank)).split("\x00")
    return _chat(rng, "everyday", f"benign.everyday.{number}", both[0], both[1])


def _fact(rng: random.Random, bank: str | None) -> Dialogue:
    number = rng.choice(_bank(range(len(FACT_ASK)), bank))
    ask, answer, table = FACT_ASK[number]
    key = rng.choice(list(table))
    both = expand(rng, f"{ask}\x00{answer}", {"key": key, "value": table[key]}).split("\x00")
    answer = both[1][:1].upper() + both[1][1:]
    return _chat(rng, "fact", f"benign.fact.{number}", both[0], answer)


def _sum(rng: random.Random, bank: str | None) -> Dialogue:
    x, y = rng.randrange(2, 20), rng.randrange(2, 10)
    plus = rng.random() < 0.6 if bank is None else bank == "a"
    if plus:
        ask, answer = f"What is {x} plus {y}?", f"{x} plus {y} is {x + y}."
    else:
        ask, answer = f"{x + y} minus {y}?", f"That makes {x}."
    return _chat(rng, "sum", f"benign.sum.{'plus' if plus else 'minus'}", ask, answer)


def _tale(rng: random.Random, bank: str | None) -> Dialogue:
    ask = expand(rng, "[[Write|Tell]] me a [[story|tale]].", {})
    return _chat(rng, "story", "benign.story", ask, story(rng, bank))


KINDS: tuple[Callable[[random.Random, str | None], Dialogue], ...] = (
    _coding, _coding, _everyday, _everyday, _fact, _sum, _tale,
)  # fmt: skip


def benign(rng: random.Random, bank: str | None = None) -> Dialogue:
    """One ordinary dialogue."""
    return rng.choice(KINDS)(rng, bank)
