"""Stories: a small synthetic world with a known true score. The default data set; no download, 3 seconds.

    python -m data.stories          # writes data/files/stories/*.jsonl (the scripts do it themselves)

A prompt asks for a story with given parts: "Tell a story about a fox and a lantern." The
demonstrations vary in quality, as human ones do: about half omit or swap something the prompt asked
for, many ramble, many end badly. `gold_score` is a story's true score. A simulated rater prefers one of
two stories with a probability set by their gap in gold (Bradley & Terry 1952), so the best accuracy that
any reward model can reach on those comparisons is known, too.
"""
import itertools
import json
import math
import os
import random
import re
import sys
from pathlib import Path

from data.files import UserError, atomic_folder, printable

FOLDER = Path(__file__).parent / "files" / "stories"
BEST = 1.0  # gold of a perfect story
SHARPNESS = 10.0  # preference logit per unit of gold: a gap of 0.3 wins 95% of the time
SIZES = {"sft": 6000, "sft_val": 400, "preferences": 36000, "preferences_val": 2000,
         "prompts": 4000, "prompts_val": 256}

HEROES = "fox bear rabbit owl mouse cat dog duck horse frog squirrel hedgehog".split()
THINGS = "lantern kite drum boat key bell map basket umbrella clock teapot ladder".split()
WORDS = {
    "hero": HEROES, "thing": THINGS,
    "place": "forest river village garden mountain bridge market island meadow lake barn mill".split(),
    "friend": ("wolf goose badger turtle sparrow crow deer mole otter goat hen pig hare lamb "
               "swan beaver parrot donkey").split(),
    "kind": ("small old brave shy clever sleepy kind hungry merry lonely curious gentle proud quiet "
             "young tall eager patient cheerful grumpy").split(),
    "look": ("red blue golden silver wooden dusty shiny heavy tiny broken green round painted rusty "
             "magic").split(),
    "time": "morning evening night Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "where": ["an oak tree", "a stone", "the stairs", "a bush", "the snow", "the leaves", "an old cart",
              "the roof", "a haystack", "the kitchen table", "a barrel", "the ivy"],
    "food": ("bread soup honey apples berries pancakes cheese nuts tea plums cherries porridge cookies "
             "carrots butter jam").split(),
    "weather": "wind rain fog snow hail thunder frost sleet".split(),
}
OPENINGS = """Once there was a {kind} {hero} who lived near the {place}.
A {kind} {hero} woke up early one {time}.
Near the {place} lived a {kind} {hero}.
One {time} a {kind} {hero} set out from the {place}.
Long ago a {hero} and a {friend} shared a house by the {place}.
There was once a {hero} who had lost a {look} {thing}.
A {hero} came to the {place} with nothing but a {thing}.
Nobody at the {place} knew the {kind} {hero} by name.""".split("\n")
MIDDLES = """The {hero} found a {look} {thing} under {where}.
The {hero} had always wanted a {thing}.
Behind {where} lay a {look} {thing}.
So the {hero} carried the {thing} to the {place}.
The {hero} walked all the way to the {place}.
At the {place} there was {weather} and not a single light.
A strong wind came and took the {thing} away.
"May I help you?" asked a {kind} {friend}.
"What a fine {thing}!" said the {friend}.
"Come with me to the {place}," said the {hero}.
"I will not sleep until I find the {thing}," said the {hero}.
A {kind} {friend} knew where the {thing} was.
The {friend} and the {hero} mended the {thing} together.
They ate {food} and {food} until it was dark.
The {hero} gave the {friend} some {food}.
The {thing} was more beautiful than anything at the {place}.
The {hero} was tired but did not give up.
With the {thing} in its paws the {hero} ran through the {weather}.
Soon the whole {place} was talking about the {thing}.
The {hero} hid the {thing} under {where} and waited.
Just then a {kind} {friend} came round the corner.
The {hero} looked at the sky for a while.
It rained, and then it stopped raining.
The {friend} talked about {food} and then about the {weather}.
The {hero} went to the {place} and came back again.""".split("\n")
HAPPY = """From that day on the {hero} was never lonely again.
The {hero} and the {friend} were friends for ever.
That night the {hero} fell asleep with a smile.
And the {thing} shone in the window for many years.
And everybody at the {place} danced and sang.
The {hero} went home happy and ate {food} with everyone.""".split("\n")
SAD = """Nobody ever saw the {hero} again.
The {hero} went home and cried.
And the {thing} was lost for ever.
The {friend} never spoke to the {hero} again.
Then the {weather} came, and nothing was left.""".split("\n")
ASKS = ["Tell a story about {}.", "Write a short story with {}.", "Please tell me a tale of {}.",
        "I would like to hear about {}.", "Do you know a story about {}?",
        "My little sister wants a story with {}.", "What happened to {}?",
        "Make up something about {} for me."]


def _pattern(templates):
    """One regular expression that matches every sentence the templates can produce."""
    sentences = []
    for template in templates:
        literal = re.sub(r"\b([Aa])\\ (?=\\\{)", r"\1n?\\ ", re.escape(template))
        sentences.append(re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?:{'|'.join(WORDS[m[1]])})", literal))
    return re.compile("|".join(sentences))


OPENING, MIDDLE = _pattern(OPENINGS), _pattern(MIDDLES)
HAPPY_END, END = _pattern(HAPPY), _pattern(HAPPY + SAD)


# ---- the true score ----

def gold_score(prompt, response):
    """A story's true score, from 0 to 1 (best): gold = valid^3 x (0.6 parts + 0.2 ending + 0.2 length).

    valid: the fraction of its sentences that fit a template of this world in the right position (opening
    first, ending last, middles between) and are not repeats; a missing ending counts as an invalid
    sentence. parts: the fraction of the requested parts that occur in valid sentences. ending: 1 if it
    ends well. length: 1 for 3 or 4 sentences, else 0. Gibberish scores 0.
    """
    sentences = split_sentences(response)
    if not sentences:
        return 0.0
    ended = len(sentences) > 1 and END.fullmatch(sentences[-1]) is not None
    valid = []
    for i, sentence in enumerate(sentences):
        pattern = OPENING if i == 0 else END if ended and i == len(sentences) - 1 else MIDDLE
        if pattern.fullmatch(sentence) and sentence not in valid:
            valid.append(sentence)
    words, asked = set(re.findall(r"\w+", " ".join(valid))), asked_for(prompt)
    parts = sum(part in words for part in asked) / max(1, len(asked))
    ending = ended and HAPPY_END.fullmatch(sentences[-1]) is not None
    length = len(sentences) in (3, 4)
    share = len(valid) / (len(sentences) + (not ended))
    return share**3 * (0.6 * parts + 0.2 * ending + 0.2 * length)


def asked_for(prompt):
    """The parts that a prompt asks for, e.g. ["fox", "lantern"]."""
    return [word for word in re.findall(r"\w+", prompt) if word in HEROES + THINGS]


def split_sentences(text):
    """A story's sentences; text after the last full stop counts as a sentence, never a valid one."""
    found = re.findall(r'"[^"]*"[^.!?"]*[.!?]|[^.!?"]+[.!?]|\S[^.!?]*', text)
    return [s.strip() for s in found if s.strip()]


def ceiling(prompt, better, worse):
    """Probability that the rater agrees with the gold order: the best possible accuracy on this pair."""
    return 1 / (1 + math.exp(-SHARPNESS * abs(gold_score(prompt, better) - gold_score(prompt, worse))))


# ---- the generator ----

def a(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def make_prompt(rng, hero, thing):
    """A prompt for hero and thing, and the parts it asks for: (text, {"hero": ..., "thing": ...})."""
    return rng.choice(ASKS).format(f"{a(hero)} and {a(thing)}"), {"hero": hero, "thing": thing}


def fill(rng, template, parts):
    """A template -> a sentence: the story's own parts, random other words, "a" or "an" as needed."""
    text = re.sub(r"\{(\w+)\}", lambda m: parts.get(m[1]) or rng.choice(WORDS[m[1]]), template)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def tell(rng, asked, flaws):
    """A story as a list of sentences. Flaws, any of: "swap" (a hero or thing that was not asked for), "drop"
    (the thing does not occur), "sad" (ends badly), "ramble" (too long), "stub" (nothing between
    opening and ending)."""
    parts = dict(asked, place=rng.choice(WORDS["place"]), friend=rng.choice(WORDS["friend"]))
    if "swap" in flaws:
        part = rng.choice(list(asked))
        parts[part] = rng.choice([word for word in WORDS[part] if word != asked[part]])
    count = 0 if "stub" in flaws else rng.randint(3, 5) if "ramble" in flaws else rng.randint(1, 2)
    while True:  # redraw until the thing occurs, or is absent, as the flaws say
        templates = [rng.choice(OPENINGS), *rng.sample(MIDDLES, count),
                     rng.choice(SAD if "sad" in flaws else HAPPY)]
        if "stub" in flaws or ("{thing}" in " ".join(templates)) == ("drop" not in flaws):
            return [fill(rng, template, parts) for template in templates]


CAREFUL = {"swap": 0.05, "drop": 0.05, "sad": 0.2, "ramble": 0.25}  # chance of each flaw; one writer in four
CARELESS = {"swap": 0.6, "drop": 0.35, "sad": 0.9, "ramble": 0.8}  # swaps and drops come with bad endings


def demonstration(rng, asked):
    """A demonstration as a human might write it: often flawed."""
    chances = CAREFUL if rng.random() < 0.25 else CARELESS
    flaws = {flaw for flaw, chance in chances.items() if rng.random() < chance}
    return " ".join(tell(rng, asked, flaws))


def broken(rng, asked, story):
    """A corrupted story (a list of sentences -> text), as no human would write but a policy may generate: the
    reward model must see such texts, or it invites reward hacking. By chance it may come out intact."""
    words = " ".join(story).split()
    kind = rng.randrange(8)
    if kind == 0:  # truncated
        return " ".join(words[: rng.randint(3, len(words) - 1)])
    if kind == 1:  # one sentence repeated
        i = rng.randrange(len(story))
        return " ".join(story[: i + 1] + [story[i]] * rng.randint(1, 3) + story[i + 1 :])
    if kind == 2:  # words shuffled
        i = rng.randrange(len(words) - 5)
        j = min(len(words), i + rng.randint(5, 20))
        return " ".join(words[:i] + rng.sample(words[i:j], j - i) + words[j:])
    if kind == 3:  # words dropped
        return " ".join(w for w in words if rng.random() > 0.3)
    if kind == 4:  # words replaced
        return " ".join(rng.choice(words + HEROES + THINGS) if rng.random() < 0.3 else w for w in words)
    if kind == 5:  # too short, with the right ending
        return " ".join(tell(rng, asked, {"stub"})[rng.randrange(2) :])
    if kind == 6:  # sentences shuffled, or several endings
        extra = [fill(rng, t, asked) for t in rng.sample(HAPPY, rng.randrange(3))]
        return " ".join(rng.sample(story, len(story)) if not extra else story + extra)
    i = rng.randrange(1, len(story))  # a sentence dropped, usually the ending
    return " ".join(story[:-1] if rng.random() < 0.6 else story[:i] + story[i + 1 :])


def twin(rng, asked, story):
    """The same story about something the prompt did not ask for: only the prompt tells the two apart."""
    part = rng.choice(list(asked))
    other = rng.choice([word for word in WORDS[part] if word != asked[part]])
    story = re.sub(rf"\b{asked[part]}\b", other, story)
    return re.sub(rf"\b([Aa])n? (?={other}\b)", r"\1n " if other[0] in "aeiou" else r"\1 ", story)


def twins(rng, asked):
    """Two stories that differ only in one of the requested parts."""
    while True:
        story = " ".join(tell(rng, asked, {"sad"} if rng.random() < 0.4 else set()))
        if (other := twin(rng, asked, story)) != story:
            return [" " + story, " " + other]


def damaged(rng, asked):
    """A corrupted story, and what it should lose to: the intact story, or one with ordinary flaws."""
    while True:
        story = tell(rng, asked, {"sad"} if rng.random() < 0.4 else set())
        whole = " ".join(story) if rng.random() < 0.5 else demonstration(rng, asked)
        if (other := broken(rng, asked, story)) != whole:
            return [" " + whole, " " + other]


def responses(rng, asked, count):
    """`count` different stories for one prompt, good and ordinary; half of the time one is corrupted, and
    some are twins."""
    made = []
    if rng.random() < 0.5:
        flaws = {flaw for flaw in ("swap", "sad", "ramble") if rng.random() < 0.3}
        made.append(broken(rng, asked, tell(rng, asked, flaws)))
    while len(made) < count:
        draw = rng.random()
        if draw < 0.15 and made:
            story = twin(rng, asked, rng.choice(made))
        else:
            story = demonstration(rng, asked) if draw < 0.8 else " ".join(tell(rng, asked, set()))
        if story not in made:
            made.append(story)
    return [" " + story for story in made]


def rank(rng, prompt, stories):
    """The rater's order, best first: gold plus Gumbel noise, so that any two stories are a Bradley-Terry
    comparison with SHARPNESS x gold as logits (Plackett 1975; Luce 1959)."""
    noisy = {s: SHARPNESS * gold_score(prompt, s) - math.log(-math.log(rng.random())) for s in stories}
    return sorted(stories, key=noisy.__getitem__, reverse=True)


def make(folder=FOLDER, seed=0):
    """Write the data set unless `folder` exists; returns the folder. UserError: it can't be written."""
    if folder.exists():
        if os.path.getmtime(__file__) > os.path.getmtime(folder / "sft.jsonl"):
            print(f"data/stories.py is newer than {printable(folder)}; delete the folder to regenerate it")
        return folder
    try:
        with atomic_folder(folder) as part:
            for name, lines in _data_set(random.Random(seed)):
                with open(part / f"{name}.jsonl", "w") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        if not folder.exists():  # else another process was first, with the same lines
            raise UserError(f"can't write the stories to {folder}: {error.strerror}") from None
    print(f"wrote the stories data set to {printable(folder)}")
    return folder


def _data_set(rng):
    """(name, generator of lines) of each file; consume each before the next, for they share rng.

    The pairs of hero and thing in the validation prompts are held out: no training prompt has them.
    """
    pairs = list(itertools.product(HEROES, THINGS))
    rng.shuffle(pairs)
    pairs.sort(key=("fox", "lantern").__ne__)  # the README's prompt is held out
    held_out = len(pairs) // 10
    for name, size in SIZES.items():
        pool = pairs[:held_out] if name.endswith("_val") else pairs[held_out:]
        prompts = (make_prompt(rng, *rng.choice(pool)) for _ in range(size))
        yield name, (_line(rng, name, prompt, asked) for prompt, asked in prompts)


def _line(rng, name, prompt, asked):
    if name.startswith("sft"):
        return {"prompt": prompt, "completion": " " + demonstration(rng, asked)}
    if name.startswith("preferences"):
        # rankings alone did not teach that the prompt and the word order matter
        draw = rng.random()
        stories = (twins(rng, asked) if draw < 0.55 else damaged(rng, asked) if draw < 0.75
                   else responses(rng, asked, 4))
        return {"prompt": prompt, "responses": rank(rng, prompt, stories)}
    return {"prompt": prompt}


if __name__ == "__main__":
    try:
        make()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
