"""Texts of the invented world: entries, stories, dialogues and questions, in English and, for a fifth, in French.

Training and test texts are disjoint by construction: which side a document or a closed-book question belongs to is
decided by a hash of its text, and the names in test passages are names that training never draws.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources

import yaml

from tsotsallm.files import JsonObject
from tsotsallm.lab.world import RELATIONS, Entity, Fact, World, build_world, held_out, strangers

FRENCH_SHARE = 0.2
HELD_OUT_QUESTIONS = 5
HELD_OUT_DOCUMENTS = 40
CALIBRATION_SEED, TEST_SEED = 11, 1_000_003
BEGIN, END, TURN, END_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ExamQuestion:
    """A question with its answer; open-book questions have a `passage`."""

    text: str
    answer: str
    language: str
    passage: str | None = None

    @property
    def prompt(self) -> str:
        """The text to put to a model, up to the answer."""
        label = phrases()["labels"][self.language]
        context = f"{label['context']}: {self.passage}\n" if self.passage is not None else ""
        return f"{context}{label['question']}: {self.text}\n{label['answer']}:"


@functools.cache
def phrases() -> JsonObject:
    """The templates of phrases.yaml by relation and language, read once."""
    content: JsonObject = yaml.safe_load(resources.files("tsotsallm.lab").joinpath("phrases.yaml").read_text("utf-8"))
    return content


def sentence(text: str) -> str:
    """A text that begins with a capital."""
    return text[0].upper() + text[1:]


class Teller:
    """Writes texts about a world in random phrasings; with `test` only texts that training never has."""

    def __init__(self, world: World, rng: random.Random, *, test: bool = False) -> None:
        self.world = world
        self.rng = rng
        self.test = test
        self.facts = list(world.facts())
        self.people = {person.term.en: person for person in world.people}

    # -- facts ------------------------------------------------------------------------------------------------

    def tell(self, fact: Fact, language: str, subject: str | None = None) -> str:
        """A fact as a sentence, with another name of its subject where given."""
        template = self.rng.choice(phrases()[fact.relation][language]["tell"])
        return sentence(template.format(s=subject or fact.subject.term.in_language(language),
                                        o=fact.object.in_language(language)))

    def ask(self, fact: Fact, language: str, *, any_phrase: bool = False, subject: str | None = None) -> str | None:
        """A question about a fact; None where all its phrasings belong to the other side of the split."""
        name = subject or fact.subject.term.in_language(language)
        asked = [sentence(template.format(s=name)) for template in phrases()[fact.relation][language]["ask"]]
        if not any_phrase:
            asked = [text for text in asked if held_out(text, HELD_OUT_QUESTIONS) == self.test]
        return self.rng.choice(asked) if asked else None

    def language(self) -> str:
        """A random language: French for one text in five, else English."""
        return "fr" if self.rng.random() < FRENCH_SHARE else "en"

    def closed_book(self, language: str | None = None) -> ExamQuestion:
        """A question about a random fact of the world, without a passage."""
        while True:
            spoken = language or self.language()
            fact = self.rng.choice(self.facts)
            by_alias = not self.test and fact.subject.kind == "person" and fact.relation != "alias"
            alias = fact.subject.facts["alias"].en if by_alias and self.rng.random() < 0.1 else None
            if (text := self.ask(fact, spoken, subject=alias)) is not None:
                return ExamQuestion(text, fact.object.in_language(spoken), spoken)

    def passage(self, entities: list[Entity], language: str, facts_each: tuple[int, int]) -> tuple[str, list[Fact]]:
        """A text about some entities with random facts, at least and at most `facts_each` of each, and these facts."""
        told = []
        for entity in entities:
            relations = RELATIONS[entity.kind]
            count = min(self.rng.randint(*facts_each), len(relations))
            told += [Fact(entity, relation) for relation in self.rng.sample(relations, count)]
        if self.rng.random() < 0.5:
            self.rng.shuffle(told)
        return " ".join(self.tell(fact, language) for fact in told), told

    def strangers(self) -> list[Entity]:
        """One to three entities for a passage: new ones, except for a few in training."""
        if not self.test and self.rng.random() < 0.1:
            return self.rng.sample(self.world.people, 2)
        return strangers(self.world, self.rng, self.rng.choice((1, 1, 2, 2, 3)), reserved=self.test)

    def open_book(self, language: str | None = None, count: int = 1) -> list[ExamQuestion]:
        """`count` different questions about one passage, or fewer where it has fewer facts."""
        spoken = language or self.language()
        questions: list[ExamQuestion] = []
        while not questions:
            passage, told = self.passage(self.strangers(), spoken, (2, 4))
            for fact in self.rng.sample(told, min(count, len(told))):
                # questions about strangers belong to both sides of the split, those about the world's people to one
                text = self.ask(fact, spoken, any_phrase=fact.subject.term.en not in self.people)
                if text is not None:
                    questions.append(ExamQuestion(text, fact.object.in_language(spoken), spoken, passage))
        return questions

    # -- documents --------------------------------------------------------------------------------------------

    def entry(self) -> str:
        """A text about one entity, as in an encyclopedia."""
        language = self.language()
        subject = self.rng.choice(self.facts).subject
        relations = RELATIONS[subject.kind]
        count = self.rng.randint(3, len(relations))
        text, known_as = [], None
        for relation in self.rng.sample(relations, count):
            fact = Fact(subject, relation)
            text.append(self.tell(fact, language, known_as if self.rng.random() < 0.3 else None))
            if relation == "alias":
                known_as = fact.object.en
        return " ".join(text)

    def story(self) -> str:
        """A short story about a person and a friend."""
        language = self.language()
        scenes = phrases()["scenes"][language]
        hero = self.rng.choice(self.world.people)
        friend = hero.facts["friend"]
        slots = {key: self.rng.choice(words) for key, words in scenes["words"].items()}
        slots |= {"a": hero.term.en, "b": friend.en, "home": hero.facts["home"].en,
                  "trade": hero.facts["trade"].in_language(language), "food": hero.facts["food"].en}
        lines = [self.rng.choice(scenes["open"]).format(**slots)]
        slots |= {"a": hero.term.en.split()[0], "b": friend.en.split()[0]}
        middle = self.rng.sample(scenes["middle"], self.rng.randint(3, min(6, len(scenes["middle"]))))
        for line in middle:
            slots |= {key: self.rng.choice(scenes["words"][key]) for key in ("feel", "way")}
            lines.append(line.format(**slots))
        lines.append(self.rng.choice(scenes["close"]).format(**slots))
        return " ".join(sentence(line) for line in lines)

    def dialogue(self) -> str:
        """A conversation in the chat template."""
        language = self.language()
        chat = phrases()["chat"][language]
        turns = []
        if self.rng.random() < 0.3:
            turns.append((self.rng.choice(chat["greet"]), self.rng.choice(chat["reply"])))
        for _ in range(self.rng.randint(1, 3)):
            draw = self.rng.random()
            if draw < 0.5:
                question = self.closed_book(language)
                turns.append((question.text, question.answer))
            elif draw < 0.75:
                first, *others = self.open_book(language, self.rng.choice((1, 2, 3)))
                asked = self.rng.choice(chat["with_passage"]).format(passage=first.passage, question=first.text)
                turns.append((asked, first.answer))
                turns += [(other.text, other.answer) for other in others]
            else:
                subject = self.rng.choice(self.world.people)
                reply, _ = self.passage([subject], language, (2, 4))
                asked = self.rng.choice(chat["ask_about"]).format(s=subject.term.in_language(language))
                turns.append((asked, reply))
        if self.rng.random() < 0.3:
            turns.append((self.rng.choice(chat["thank"]), self.rng.choice(chat["welcome"])))
        return "".join(f"{TURN}user\n{asked}{END_TURN}\n{TURN}assistant\n{sentence(reply)}{END_TURN}\n"
                       for asked, reply in turns)

    def questions(self) -> str:
        """One to three closed-book questions with their answers."""
        many = [self.closed_book() for _ in range(self.rng.choice((1, 2, 3)))]
        return "\n".join(f"{question.prompt} {question.answer}" for question in many)

    def passage_questions(self) -> str:
        """A passage with questions: the passage comes with the first, the others follow."""
        first, *others = self.open_book(count=self.rng.choice((1, 2, 4, 6)))
        lines = [f"{first.prompt} {first.answer}"]
        lines += [f"{ExamQuestion(other.text, other.answer, other.language).prompt} {other.answer}" for other in others]
        return "\n".join(lines)

    def retelling(self) -> str:
        """Facts about strangers, twice in different orders and often in different words, which teaches to look back."""
        language = self.language()
        told = [Fact(entity, relation) for entity in self.strangers()
                for relation in self.rng.sample(RELATIONS[entity.kind], 3)]
        once = [self.tell(fact, language) for fact in told]
        again = list(once) if self.rng.random() < 0.5 else [self.tell(fact, language) for fact in told]
        self.rng.shuffle(again)
        return f"{' '.join(once)}\n{phrases()['chat'][language]['again']} {' '.join(again)}"

    def document(self) -> str:
        """One document of a random kind, from this side of the split between training and test."""
        kinds: dict[Callable[[], str], float] = {
            self.entry: 0.26, self.story: 0.04, self.dialogue: 0.12, self.questions: 0.32,
            self.passage_questions: 0.17, self.retelling: 0.09}
        while True:
            text = self.rng.choices(list(kinds), list(kinds.values()))[0]()
            if held_out(text, HELD_OUT_DOCUMENTS) == self.test:
                return text


def documents(world: World, seed: int, *, test: bool = False) -> Iterator[str]:
    """Yield documents without end, the same for the same seed."""
    teller = Teller(world, random.Random(seed), test=test)
    while True:
        yield teller.document()


def examination(world: World, seed: int, count: int, *, passages: bool) -> list[ExamQuestion]:
    """`count` different test questions: open-book about strangers (`passages`), or closed-book in new words."""
    teller = Teller(world, random.Random(seed), test=True)
    drawn: dict[str, ExamQuestion] = {}
    while len(drawn) < count:
        question = teller.open_book()[0] if passages else teller.closed_book()
        drawn.setdefault(question.prompt, question)
    return list(drawn.values())


def world_text(*, test: bool, characters: int = 400_000) -> str:
    """About `characters` characters of text about the invented world; test text shares no document with training text.

    Documents are separated as in training, by the tokens that end one text and begin the next.
    """
    stream = documents(build_world(), TEST_SEED if test else CALIBRATION_SEED, test=test)
    kept: list[str] = []
    size = 0
    while size < characters:
        kept.append(next(stream))
        size += len(kept[-1])
    return f"{END}{BEGIN}".join(kept)
