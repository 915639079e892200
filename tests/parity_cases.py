"""Random answer files from seeds, the same for the official scripts (data/parity/make_fixtures.py) and for
ours (test_benchmarks_parity.py).

Also the stand-ins for NLTK and spaCy: simple rules, so that both sides find the same nouns. No file of this
folder holds official code.
"""

import random
import types

AMBER_TYPES = (
    "discriminative-attribute-state",
    "discriminative-attribute-number",
    "discriminative-attribute-action",
    "discriminative-hallucination",
    "discriminative-relation",
    "relation",
)
ASSOCIATION = {
    "dog": ["puppy", "animal"],
    "cat": ["kitten", "animal"],
    "person": ["man", "woman", "people"],
    "table": ["desk"],
    "tree": ["forest", "bush"],
    "forest": ["tree"],
    "sky": [],
    "car": ["vehicle"],
    "bus": ["vehicle"],
    "cup": ["mug"],
    "TV": ["screen"],
    "light": [],
}
SAFE_WORDS = ("light", "shoe", "animal")
NOISE = ("quickly", "running", "very", "unicorn", "lamp", "a", "the", "is", "Dog", "red")
ADJECTIVES = ("red", "wooden", "old", "big")
SYNONYMS = (
    "person, man, woman, child, people",
    "dog, puppy",
    "cat, kitten",
    "hot dog",
    "chair, seat, stool",
    "toilet, potty",
    "tie, bow, bow tie",
    "dining table, table, coffee table",
    "car, cab, van",
    "wine glass",
    "sports ball, ball",
    "stop sign",
    "bus",
    "train, locomotive",
    "stove top oven, oven",
)
REFOMB_TYPES = (
    "Coarse Perception",
    "Fine-grained perception",
    "Relation reasoning",
    "Attribute reasoning",
    "Time series inference",
    "Mechanical logical reasoning",
    "Creative generation",
    "OCR",
)
MMSTAR_PARTS = {
    "coarse perception": ("image scene and topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("object counting", "recognition", "localization"),
    "instance reasoning": (
        "single-instance reasoning",
        "cross-instance attribute reasoning",
        "cross-instance relation reasoning",
    ),
    "logical reasoning": ("code & sequence reasoning", "diagram reasoning", "common reasoning"),
    "science & technology": (
        "biology & chemistry & physics",
        "electronics & energy & mechanical eng.",
        "geography & earth science & agriculture",
    ),
    "math": ("geometry", "numeric commonsense and calculation", "statistical reasoning"),
}


def singular(word):
    "The stand-in for a lemmatiser."
    return word[:-1] if word.endswith("s") and len(word) > 3 and word != "bus" else word


def is_noun(word):
    "The stand-in for a part-of-speech tagger."
    return not word.endswith(("ly", "ing")) and word.lower() not in ("a", "the", "is", "very", *ADJECTIVES)


def similarity(near, word, other):
    """The stand-in for word vectors: 1 for the same word, 0.81 for near pairs, 0.8 (not above the limit) for
    words of equal length.
    """
    return (
        1.0
        if word == other
        else 0.81
        if tuple(sorted((word, other))) in near
        else 0.8
        if len(word) == len(other)
        else 0.1
    )


def amber_case(seed, association=None, annotations=None):
    """One AMBER answer file with its annotations: random ones, or a part of the real ones.

    Seeds modulo 8 choose the manner: empty answers, all No, all Yes, lower case, no noun of the vocabulary,
    the truth, and two mixtures.
    """
    rng, manner = random.Random(f"amber/{seed}"), seed % 8
    association = association or ASSOCIATION
    words = sorted(set(association).union(*association.values()))
    if annotations is None:
        annotations = []
        for id in range(1, rng.randint(2, 200)):
            if rng.random() < 0.3:
                truth, hallu = (rng.sample(list(association), rng.randint(0, most)) for most in (5, 3))
                row = {"type": "generative", "truth": truth, "hallu": hallu}
            else:
                row = {"type": rng.choice(AMBER_TYPES), "truth": rng.choice(("yes", "no"))}
            annotations.append({"id": id} | row)
        rows = annotations
    else:
        rows = rng.sample(annotations, 800)
    answers = [{"id": row["id"], "response": _amber_answer(rng, manner, row, words)} for row in rows]
    near = {tuple(sorted(rng.sample(words, 2))) for _ in range(len(words) // 2)}
    return {
        "annotations": annotations,
        "association": association,
        "answers": answers,
        "near": near,
        "safe": SAFE_WORDS,
    }


def _amber_answer(rng, manner, row, words):
    "One answer in the file's manner."
    if manner == 0:
        return ""
    if row["type"] != "generative":
        text = {1: "No", 2: "Yes", 3: rng.choice(("yes", "no")), 5: row["truth"].capitalize()}.get(manner)
        return text or rng.choice(("Yes", "No", "Yes", "No", "yes", "no.", "", "I cannot tell", " No"))
    pool = {4: list(NOISE), 5: row["truth"] or ["sky"]}.get(manner, words + list(NOISE))
    text = " ".join(rng.choice(pool) + rng.choice(("", "", "s")) for _ in range(rng.randint(0, 25)))
    return text.lower() if manner == 3 else text


def halbench_case(seed, synonyms=SYNONYMS):
    """One Object HalBench answer file with the judge's phrases and a small COCO.

    Seeds modulo 6: empty answers, no objects, all true, upper case, mixtures."""
    rng, manner = random.Random(f"halbench/{seed}"), seed % 6
    words = sorted({w.strip() for line in synonyms for w in line.split(", ")})
    names = list(dict.fromkeys(line.split(", ")[0].strip() for line in synonyms))
    ids = rng.sample(range(1, 10**6), rng.randint(1, 30))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    instances = [
        {"image_id": id, "category_id": rng.randint(1, len(names))}
        for id in ids
        for _ in range(rng.randint(0, 5))
    ]
    captions = [
        {"image_id": id, "caption": _sentence(rng, words, 8).capitalize()}
        for id in ids
        for _ in range(rng.randint(0, 3))
    ]
    caps = []
    for id in ids:
        true = [names[a["category_id"] - 1] for a in instances if a["image_id"] == id] or ["unicorn"]
        odd = ["unicorn", "baby elephant", "toilet seat", "bow tie", "passenger train", "wine glas"]
        pool = {1: list(NOISE), 2: true}.get(manner, words + odd)
        phrases = [
            "" if manner == 0 else _phrase(rng, pool) for _ in range(0 if manner == 0 else rng.randint(0, 8))
        ]
        text = ""
        if manner != 0:
            start = rng.choice(("", "Assistant: "))
            sentence = _sentence(rng, pool, rng.randint(0, 20))
            text = start + sentence + rng.choice(("", "  ", " ."))
        caps.append(
            {
                "image_id": id,
                "question": "Describe.",
                "answer": text.upper() if manner == 3 else text,
                "phrases": phrases,
            }
        )
    images = [{"id": id} for id in ids]
    return {
        "synonyms": synonyms,
        "images": images,
        "categories": categories,
        "instances": instances,
        "captions": captions,
        "caps": caps,
    }


def _phrase(rng, pool):
    "One object phrase as a judge might give it."
    words = (
        [rng.choice(ADJECTIVES)] * (rng.random() < 0.3)
        + [rng.choice(pool)]
        + [rng.choice(pool)] * (rng.random() < 0.1)
    )
    return " ".join(words) + rng.choice(("", "", "s"))


def _sentence(rng, pool, n):
    "n words or pairs of words, some plural."
    return " ".join(rng.choice(pool + list(NOISE)) + rng.choice(("", "", "s")) for _ in range(n))


def reply_case(seed):
    "Judges' replies, some of them no JSON."
    rng = random.Random(f"reply/{seed}")
    body = (
        '["' + '", "'.join(rng.choice(("dog", "red car", "hot dog")) for _ in range(rng.randint(1, 4))) + '"]'
    )
    others = (
        f"Objects:\n{body}",
        f"{body}\nDone.",
        f"Here: {body}",
        "no objects",
        "",
        f"[]\n{body}",
        f"  {body}  \n",
        "()",
    )
    return rng.choice((body, "[]", *others))


def mmhal_case(seed):
    "96 judge texts. Seeds modulo 5: all unreadable, all 6, lower case, mixtures."
    rng, manner, texts = random.Random(f"mmhal/{seed}"), seed % 5, []
    for _ in range(96):
        s = rng.randint(0, 6)
        text = rng.choice(
            (
                f"Fine.\n- Rating: {s}, so",
                f"RATING: {s}",
                f"Rating: {s}. Again rating: {s}",
                f"Rating: {s} or rating: {rng.randint(0, 6)}",
                f"**Rating:** {s}",
                f"Rating {s}",
                "",
                f"Rating: {s}0",
                f"rating:  {s}",
                "Rating: 7",
                "no idea",
            )
        )
        texts.append({0: "I cannot rate this.", 1: "Rating: 6", 2: text.lower()}.get(manner, text))
    return texts


def refomb_case(seed):
    """Items with type and the judge's attempts, of which all but the last are unreadable (the official script
    asks again).

    Seeds modulo 6: all wins, all losses, all ties, several marks, mixtures.
    """
    rng, manner, items = random.Random(f"refomb/{seed}"), seed % 6, []
    for i in range(rng.randint(1, 30)):
        mark = {0: "B", 1: "A", 2: "C"}.get(manner) or rng.choice("ABC")
        text = f"On balance [[{mark}]]" + (f" and not [[{rng.choice('ABC')}]]" if manner == 3 else "")
        attempts = [
            rng.choice(("", "[A]", "[[D]]", "[[a]]", "[[A", "[ [B] ]"))
            for _ in range(rng.choice((0, 0, 0, 1, 2)))
        ] + [text]
        items.append({"id": i, "type": rng.choice(REFOMB_TYPES), "attempts": attempts})
    return items


def pope_case(seed):
    "Labels and answers. Seeds modulo 6: empty answers, all no, all yes, mixtures."
    rng, manner = random.Random(f"pope/{seed}"), seed % 6
    labels, answers = [], []
    for i in range(rng.randint(1, 300)):
        labels.append(
            {
                "question_id": i + 1,
                "image": f"{i}.jpg",
                "text": f"Is there a thing {i}?",
                "label": rng.choice(("yes", "no")),
            }
        )
        text = {0: "", 1: "No", 2: "Yes"}.get(manner)
        if text is None:
            text = rng.choice(
                (
                    "Yes",
                    "No",
                    "yes",
                    "no",
                    "No, there is not.",
                    "There is not a dog",
                    "Yes. But no cat",
                    "NO",
                    "not",
                    "Nothing",
                    "no,thing",
                    "I do not, no",
                    "",
                )
            )
        answers.append({"question": f"Is there a thing {i}?", "answer": text})
    return labels, answers


def mmstar_case(seed):
    "Rows of all 18 sub-categories. Seeds modulo 5: empty predictions, lower case, all right, mixtures."
    rng, manner, rows = random.Random(f"mmstar/{seed}"), seed % 5, []
    for category, parts in MMSTAR_PARTS.items():
        for part in parts:
            for _ in range(rng.randint(1, 10)):
                answer, letter = rng.choice("ABCD"), rng.choice("ABCD")
                text = rng.choice(
                    (
                        letter,
                        f"({letter})",
                        f"Option {letter}.",
                        f"The answer is {letter}",
                        f"The answer is: {letter}",
                        "apple",
                        "Because",
                        f"\n{letter}\n",
                        "(",
                        "",
                        f"It is {letter}",
                    )
                )
                text = {0: "", 1: text.lower(), 2: answer}.get(manner, text)
                row = {"index": len(rows), "prediction": text, "answer": answer}
                rows.append(row | {"category": category, "l2_category": part, "bench": "x"})
    return rows


def llava_case(seed):
    "LLaVA-Bench reviews with whole and half points, some failed."
    rng = random.Random(f"llava/{seed}")
    reviews = [
        {
            "category": rng.choice(("conv", "detail", "complex")),
            "tuple": [rng.randint(2, 20) / 2, rng.randint(0, 20) / 2],
        }
        for _ in range(rng.randint(1, 90))
    ]
    failed = {"category": rng.choice(("conv", "detail")), "tuple": [-1, -1]}
    return [failed if rng.random() < 0.1 * (seed % 3) else review for review in reviews]


class Word:
    "The stand-in for a spaCy document of one word, or for its tokens."

    near = set()

    def __init__(self, text):
        self.text, self.lemma_, self.tag_ = text, singular(text.lower()), "NN" if is_noun(text) else "JJ"

    def similarity(self, other):
        return similarity(Word.near, self.text, other.text)

    def __iter__(self):
        return (Word(t) for t in self.text.split())


def stand_in_modules():
    "Modules that take the places of NLTK and spaCy, `{name: module}`."
    lemmatizer = type("WordNetLemmatizer", (), {"lemmatize": staticmethod(singular)})
    content = {
        "nltk": {
            "word_tokenize": str.split,
            "pos_tag": lambda tokens: [(t, "NN" if is_noun(t) else "JJ") for t in tokens],
        },
        "nltk.stem": {"WordNetLemmatizer": lemmatizer},
        "nltk.wordnet": {"WordNetLemmatizer": lemmatizer},
        "spacy": {"load": lambda name: Word},
    }
    modules = {name: types.ModuleType(name) for name in content}
    for name, module in modules.items():
        vars(module).update(content[name])
    modules["nltk"].stem, modules["nltk"].wordnet = modules["nltk.stem"], modules["nltk.wordnet"]
    return modules
