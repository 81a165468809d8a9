"""Writes word_problems.jsonl: short maths word problems with step-by-step answers, the same bytes every time.

Every answer ends with `#### <number>`; every step is an equation that anyone can check.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

COUNT = 400
SEED = 2510
TARGET = Path(__file__).with_name("word_problems.jsonl")

NAMES = ["Amara", "Bo", "Carla", "Dmitri", "Esra", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Lena"]
FRUITS = ["apples", "pears", "plums", "peaches", "lemons"]
CROPS = ["tomato plants", "bean plants", "cabbages", "leeks"]
SHELVED = ["novels", "comics", "atlases", "cookbooks"]
BAKED = ["muffins", "rolls", "pies", "waffles"]
TOYS = ["marbles", "stickers", "stamps", "beads"]

Problem = tuple[str, list[str], int]
"""Question, steps, final number."""


def shopping(rng: random.Random) -> Problem:
    """Price times pieces, taken from a note."""
    name, fruit = rng.choice(NAMES), rng.choice(FRUITS)
    pieces, price = rng.randint(3, 9), rng.randint(2, 5)
    cost = pieces * price
    paid = cost + rng.randint(2, 20)
    question = (
        f"{name} buys {pieces} bags of {fruit} at ${price} a bag and pays with ${paid}. How much change is there?"
    )
    steps = [f"The bags cost {pieces} * {price} = {cost} dollars.", f"The change is {paid} - {cost} = {paid - cost}."]
    return question, steps, paid - cost


def garden(rng: random.Random) -> Problem:
    """Rows of plants, some of which are lost."""
    crop, rows, each = rng.choice(CROPS), rng.randint(4, 12), rng.randint(5, 11)
    lost = rng.randint(3, 15)
    total = rows * each
    question = f"A garden has {rows} rows of {each} {crop}. Hail destroys {lost} of them. How many are left?"
    steps = [
        f"At first there are {rows} * {each} = {total}.",
        f"After the hail, {total} - {lost} = {total - lost} stay.",
    ]
    return question, steps, total - lost


def train(rng: random.Random) -> Problem:
    """Distance of two stretches at different speeds."""
    first, second = rng.randint(2, 5), rng.randint(2, 4)
    fast, slow = 10 * rng.randint(8, 14), 10 * rng.randint(3, 7)
    question = (
        f"A train runs {first} hours at {fast} km per hour, then {second} hours at {slow} km per hour. "
        "How many kilometres does it cover?"
    )
    a, b = first * fast, second * slow
    steps = [
        f"The first part is {first} * {fast} = {a} km.",
        f"The second is {second} * {slow} = {b} km.",
        f"Together {a} + {b} = {a + b} km.",
    ]
    return question, steps, a + b


def sharing(rng: random.Random) -> Problem:
    """Equal shares after keeping some."""
    name, toy, friends = rng.choice(NAMES), rng.choice(TOYS), rng.randint(3, 8)
    share, kept = rng.randint(4, 12), rng.randint(5, 20)
    shared = friends * share
    question = (
        f"{name} has {shared + kept} {toy}, keeps {kept} and splits the rest evenly among {friends} friends. "
        "How many does each friend get?"
    )
    steps = [
        f"There are {shared + kept} - {kept} = {shared} {toy} to split.",
        f"Each friend gets {shared} / {friends} = {share}.",
    ]
    return question, steps, share


def savings(rng: random.Random) -> Problem:
    """Weeks until a price is reached."""
    name, weekly, weeks = rng.choice(NAMES), rng.randint(4, 15), rng.randint(3, 12)
    start = rng.randint(10, 60)
    missing = weekly * weeks
    question = (
        f"A bicycle lamp set costs ${start + missing}. {name} already has ${start} and saves ${weekly} a week. "
        "After how many weeks is it affordable?"
    )
    steps = [
        f"What is missing is {start + missing} - {start} = {missing} dollars.",
        f"That takes {missing} / {weekly} = {weeks} weeks.",
    ]
    return question, steps, weeks


def bakery(rng: random.Random) -> Problem:
    """Trays baked, most of them sold."""
    goods, trays, each = rng.choice(BAKED), rng.randint(3, 9), rng.randint(8, 16)
    total = trays * each
    morning, noon = rng.randint(5, total // 2), rng.randint(3, total // 3)
    sold = morning + noon
    question = (
        f"A bakery makes {trays} trays of {each} {goods}. It sells {morning} in the morning and {noon} at noon. "
        "How many remain?"
    )
    steps = [
        f"It makes {trays} * {each} = {total}.",
        f"It sells {morning} + {noon} = {sold}.",
        f"So {total} - {sold} = {total - sold} remain.",
    ]
    return question, steps, total - sold


def ages(rng: random.Random) -> Problem:
    """An age some years from now."""
    younger, older = rng.sample(NAMES, 2)
    age, times, years = rng.randint(4, 12), rng.randint(2, 4), rng.randint(3, 10)
    product = age * times
    question = (
        f"{younger} is {age} years old and {older} is {times} times as old. How old will {older} be in {years} years?"
    )
    steps = [
        f"{older} is {age} * {times} = {product} now.",
        f"In {years} years that is {product} + {years} = {product + years}.",
    ]
    return question, steps, product + years


def library(rng: random.Random) -> Problem:
    """Books moved to shelves of one size."""
    books, size, shelves = rng.choice(SHELVED), rng.randint(6, 15), rng.randint(4, 10)
    bought = rng.randint(5, 20)
    total = size * shelves
    old = total - bought
    question = (
        f"A library owns {old} {books} and buys {bought} more. One shelf holds {size}. "
        "How many shelves do they fill altogether?"
    )
    steps = [f"There are {old} + {bought} = {total} {books}.", f"They fill {total} / {size} = {shelves} shelves."]
    return question, steps, shelves


def fence(rng: random.Random) -> Problem:
    """Perimeter of a field, priced by the metre."""
    long, wide, price = rng.randint(12, 40), rng.randint(5, 11), rng.randint(2, 6)
    half = long + wide
    around = 2 * half
    question = (
        f"A field is {long} m long and {wide} m wide. Fencing costs ${price} a metre. "
        "What does a fence around the whole field cost?"
    )
    steps = [
        f"Two sides measure {long} + {wide} = {half} m.",
        f"All four measure 2 * {half} = {around} m.",
        f"The fence costs {around} * {price} = {around * price} dollars.",
    ]
    return question, steps, around * price


def reading(rng: random.Random) -> Problem:
    """Pages left of a book."""
    name, days, pages, left = rng.choice(NAMES), rng.randint(3, 9), rng.randint(12, 35), rng.randint(20, 150)
    read = days * pages
    question = (
        f"{name} reads {pages} pages a day for {days} days from a book of {read + left} pages. "
        "How many are still unread?"
    )
    steps = [
        f"In {days} days that makes {days} * {pages} = {read} pages.",
        f"Unread are {read + left} - {read} = {left}.",
    ]
    return question, steps, left


def wages(rng: random.Random) -> Problem:
    """Pay for hours and overtime."""
    name, hours, rate = rng.choice(NAMES), rng.randint(5, 9), rng.randint(11, 20)
    overtime, extra = rng.randint(1, 4), rng.randint(21, 30)
    normal, late = hours * rate, overtime * extra
    question = (
        f"{name} works {hours} hours at ${rate} an hour and {overtime} more at ${extra} an hour. "
        "How much does that earn?"
    )
    steps = [
        f"The regular pay is {hours} * {rate} = {normal}.",
        f"The rest is {overtime} * {extra} = {late}.",
        f"In total {normal} + {late} = {normal + late} dollars.",
    ]
    return question, steps, normal + late


def tank(rng: random.Random) -> Problem:
    """Net flow into a tank."""
    inflow, outflow, minutes = rng.randint(12, 30), rng.randint(3, 11), rng.randint(5, 20)
    net = inflow - outflow
    question = (
        f"A tap pours {inflow} litres a minute into an empty tank that leaks {outflow} litres a minute. "
        f"How much water is inside after {minutes} minutes?"
    )
    steps = [
        f"Each minute adds {inflow} - {outflow} = {net} litres.",
        f"After {minutes} minutes there are {net} * {minutes} = {net * minutes} litres.",
    ]
    return question, steps, net * minutes


def discount(rng: random.Random) -> Problem:
    """A percentage off a round price."""
    name, price, percent = rng.choice(NAMES), 20 * rng.randint(2, 15), rng.choice([5, 10, 15, 20, 25, 30, 40])
    saved = price * percent // 100
    question = f"{name} finds a coat of ${price} at {percent}% off. What does the coat cost now?"
    hundredths = price * percent
    steps = [
        f"Multiply first: {price} * {percent} = {hundredths}.",
        f"The discount is {hundredths} / 100 = {saved} dollars.",
        f"The coat costs {price} - {saved} = {price - saved} dollars.",
    ]
    return question, steps, price - saved


def average(rng: random.Random) -> Problem:
    """Mean of three counts."""
    name, mean = rng.choice(NAMES), rng.randint(15, 60)
    first, second = mean - rng.randint(1, 9), mean + rng.randint(2, 12)
    third = 3 * mean - first - second
    question = (
        f"{name} counts {first} birds on Monday, {second} on Tuesday and {third} on Wednesday. What is the average?"
    )
    both, total = first + second, 3 * mean
    steps = [
        f"The first two days make {first} + {second} = {both}.",
        f"All three make {both} + {third} = {total}.",
        f"The average is {total} / 3 = {mean}.",
    ]
    return question, steps, mean


TEMPLATES: list[Callable[[random.Random], Problem]] = [
    shopping,
    garden,
    train,
    sharing,
    savings,
    bakery,
    ages,
    library,
    fence,
    reading,
    wages,
    tank,
    discount,
    average,
]


def problems(count: int = COUNT, seed: int = SEED) -> list[dict[str, str]]:
    """Distinct problems, the templates taking turns."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    turn = 0
    while len(rows) < count:
        question, steps, number = TEMPLATES[turn % len(TEMPLATES)](rng)
        if question not in rows:
            rows[question] = {"question": question, "answer": " ".join(steps) + f"\n#### {number}"}
            turn += 1
    return list(rows.values())


def as_jsonl(rows: list[dict[str, str]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.write_text(as_jsonl(problems()), encoding="utf-8", newline="\n")
    print(target)
