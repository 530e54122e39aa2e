"""Write the zero-shot items that ship with the project (``cfsp/assets/tasks/books_*.jsonl``).

    python scripts/make_zero_shot_items.py [--out cfsp/assets/tasks] [--seed 1913]

All items were written for this project, in the English of the books on which the bundled model was trained:

* minimal pairs: two sentences that differ in one point of grammar, of which one is right. Templates, filled
  by seeded sampling. A template is told the number of the item it fills, and uses it to take turns (singular
  and plural, "he took" and "had taken"), so that a liking for one form, whatever the context, gains little;
* cloze: a context and four ways to end it, written by hand (the blocks of text in the second half).

Each row is ``{"query": str, "choices": [str, ...], "gold": int, "phenomenon": str}``. Pairs have an empty
query: the two sentences are compared by their log-likelihood. The position of the right choice is shuffled
and balanced within each phenomenon. The same seed gives the same bytes; no item occurs twice.

The module is long because the words and the hand-written items are in it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SEED = 1913
ITEMS_PER_TEMPLATE = 50


class Item(NamedTuple):
    """A row, with the right choice first.

    Attributes:
        query: the context; empty for pairs.
        choices: the right choice, then the wrong ones.
    """

    query: str
    choices: tuple[str, ...]


Template = Callable[[random.Random, int], Item]


def phrases(text: str) -> tuple[str, ...]:
    """Split a text into phrases, which a bar separates."""
    return tuple(phrase.strip() for phrase in text.split("|"))


def forms(text: str) -> tuple[tuple[str, ...], ...]:
    """Split a text into rows of words: a bar separates rows, a slash the words of a row."""
    return tuple(tuple(word.strip() for word in row.split("/")) for row in text.split("|"))


def sentence(*parts: str) -> str:
    """Join the parts that are not empty, begin with a capital, end with a full stop."""
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?" else ".")


def contrast(before: str, right: str, wrong: str, after: str = "") -> Item:
    """Make a pair of sentences that differ only in ``right`` and ``wrong``."""
    return Item("", (sentence(before, right, after), sentence(before, wrong, after)))


# -------------------------------------------------------------------------------------------- words

# Singular and plural.
THINGS = forms(
    """letter / letters | book / books | picture / pictures | house / houses | tree / trees
    | flower / flowers | ship / ships | horse / horses | stone / stones | room / rooms | window / windows
    | garden / gardens | tower / towers | door / doors | village / villages | mountain / mountains
    | story / stories | key / keys | knife / knives | table / tables | chair / chairs | candle / candles
    | sword / swords | bird / birds"""
)
PEOPLE = forms(
    """man / men | woman / women | child / children | boy / boys | girl / girls | soldier / soldiers
    | servant / servants | lady / ladies | gentleman / gentlemen | brother / brothers | sister / sisters
    | friend / friends | priest / priests | sailor / sailors | prisoner / prisoners | stranger / strangers
    | officer / officers"""
)
# Words that are less common, or whose plural is irregular.
RARER = forms(
    """wolf / wolves | thief / thieves | goose / geese | mouse / mice | foot / feet | tooth / teeth
    | leaf / leaves | sportsman / sportsmen | fisherman / fishermen | peasant / peasants
    | shepherd / shepherds | widow / widows | cottage / cottages | lantern / lanterns | chapel / chapels
    | meadow / meadows | basket / baskets | carriage / carriages | ribbon / ribbons | bottle / bottles
    | pistol / pistols | kettle / kettles | chimney / chimneys | orchard / orchards | pebble / pebbles
    | feather / feathers | diamond / diamonds | monk / monks | tailor / tailors | beggar / beggars
    | spider / spiders | donkey / donkeys"""
)
MEN = phrases("old man | king | boy | young gentleman | captain | prince | father | uncle | monk | duke | husband")
WOMEN = phrases("old woman | queen | girl | young lady | widow | princess | mother | aunt | nun | duchess | wife")
ADJECTIVES = phrases("old | little | great | beautiful | strange | new | poor | large | small | fine | dark")
COLOURS = phrases("old | black | white | red | grey | brown | green | golden")

# Subjects of a verb in the past tense, where number does not matter.
SUBJECTS = phrases(
    """he | she | they | we | I | the old man | the young lady | the king | my father | her mother
    | the captain | the stranger | the boy | his wife | the two brothers | the servant | the doctor"""
)
SEEN = phrases("looked at | saw | remembered | spoke of | thought of | pointed to | had seen | came upon | passed")
TAILS = (
    "",
    *phrases("once more | for a long time | in silence | at last | that evening | with great interest"),
)

# Base, past, participle, -ing.
VERBS: dict[tuple[str, ...], tuple[str, ...]] = {
    tuple(key.split()): phrases(complements)
    for key, complements in {
        "go went gone going": "to the village | home | out of the room | into the garden",
        "take took taken taking": "the money | a long walk | her hand | a place at the table",
        "see saw seen seeing": "the old house | the king | a great many people | her face",
        "give gave given giving": "her a book | him the letter | them some bread",
        "write wrote written writing": "a letter | to the bishop | a little book",
        "speak spoke spoken speaking": "to the servant | of the war | in a low voice",
        "break broke broken breaking": "the window | the law | a promise",
        "fall fell fallen falling": "into the water | upon the ground | in love",
        "grow grew grown growing": "old and weak | very tired | more and more afraid",
        "begin began begun beginning": "a new life | the work | the story",
        "rise rose risen rising": "from the table | early in the morning | from the dead",
        "throw threw thrown throwing": "the book upon the table | a stone | away the money",
        "eat ate eaten eating": "the bread | a good dinner | nothing all day",
        "drive drove driven driving": "to the town | the horses | them away",
        "hide hid hidden hiding": "behind the door | the money | the letter",
        "choose chose chosen choosing": "a wife | the best of them | a better way",
        "draw drew drawn drawing": "near to the fire | a deep breath | the sword",
        "do did done doing": "all that was possible | a great deal of good | nothing wrong",
        "steal stole stolen stealing": "the silver | into the house | a horse",
        "shake shook shaken shaking": "the tree | the dust from the carpet",
        "swear swore sworn swearing": "to be silent | a great oath",
        "wear wore worn wearing": "a black coat | no hat",
        "tear tore torn tearing": "the paper | the letter to pieces",
        "forsake forsook forsaken forsaking": "the old faith | the ship",
        "ride rode ridden riding": "a white horse | to the castle",
        "bear bore borne bearing": "it patiently | the pain",
        "slay slew slain slaying": "the dragon | the king's son",
    }.items()
}


def verb_phrase(rng: random.Random) -> tuple[tuple[str, ...], str]:
    """Draw a verb; returns its forms, and a complement."""
    verb = rng.choice(tuple(VERBS))
    return verb, rng.choice(VERBS[verb])


# -------------------------------------------------------------------------- templates: books_agreement


def determiner_noun(rng: random.Random, turn: int) -> Item:
    """Pair such as "these wolves / these wolf"."""
    number = turn % 2
    noun = rng.choice(THINGS + RARER)
    determiner = rng.choice((("this", "that"), ("these", "those"))[number])
    before = f"{rng.choice(SUBJECTS)} {rng.choice(SEEN)} {determiner}"
    return contrast(before, noun[number], noun[1 - number], rng.choice(TAILS))


def determiner_adjective_noun(rng: random.Random, turn: int) -> Item:
    """Pair such as "those large old baskets / those large old basket"."""
    number = turn % 2
    noun = rng.choice(THINGS + RARER)
    determiner = rng.choice((("this", "that"), ("these", "those"))[number])
    adjectives = f"{rng.choice(phrases('poor | beautiful | strange | large | little'))} {rng.choice(COLOURS)}"
    before = f"{rng.choice(SUBJECTS)} {rng.choice(SEEN)} {determiner} {adjectives}"
    return contrast(before, noun[number], noun[1 - number], rng.choice(TAILS))


def quantifier_noun(rng: random.Random, turn: int) -> Item:
    """Pair such as "every house / every houses; three houses / three house"."""
    number = turn % 2
    noun = rng.choice(THINGS + RARER)
    one = phrases("one | every | each | another | a single")
    more = phrases("two | three | many | several | a few | both | four | a great many")
    adjective = rng.choice(("", "little ", "great ", "strange "))
    before = f"{rng.choice(SUBJECTS)} {rng.choice(SEEN)} {rng.choice((one, more)[number])} {adjective}".rstrip()
    return contrast(before, noun[number], noun[1 - number], rng.choice(TAILS))


BE = forms("was / were | is / are")
STATES = phrases("very old | not to be seen | quite new | very beautiful | well known to me | lost | not there")


def subject_verb(rng: random.Random, turn: int) -> Item:
    """Pair such as "The wolves were / was not to be seen"."""
    number = turn % 2
    be = rng.choice(BE)
    subject = f"the {rng.choice(ADJECTIVES)} {rng.choice(THINGS + RARER)[number]}"
    return contrast(subject, be[number], be[1 - number], rng.choice(STATES))


def present_verb(rng: random.Random, turn: int) -> Item:
    """Pair such as "He knows / He know; They know / They knows"."""
    number = turn % 2
    verbs = (
        ("knows", "know", "nothing of it | the truth | what to do"),
        ("thinks", "think", "that it is too late | of nothing else"),
        ("lives", "live", "in a little house | by the sea | in the country"),
        ("comes", "come", "here every day | from the village"),
        ("loves", "love", "the sea | the old house"),
        ("goes", "go", "to church | out every morning"),
        ("wants", "want", "to see you | some money"),
        ("believes", "believe", "in God | every word of it"),
        ("speaks", "speak", "of you every day | the truth"),
        ("seems", "seem", "to be very happy | tired"),
    )
    one = phrases("he | she | my brother | the old man | the boy | your sister | the old man in the village")
    more = phrases("they | we | my brothers | the old men | the boys | your sisters | the old men in the village")
    *verb, ends = rng.choice(verbs)
    subject = rng.choice((one, more)[number])
    return contrast(subject, verb[number], verb[1 - number], rng.choice(phrases(ends)))


REFLEXIVES = phrases("myself | himself | herself | ourselves | themselves")
ACTIONS = forms(
    """threw / into a chair | found / alone in the dark | hid / behind the curtain
    | placed / before the fire | flung / upon the bed | asked / what it could mean
    | said to / that all was lost | saw / in the glass | made / ready for the journey
    | had lost / in the forest | gave / up to despair | could not help /"""
)
ASIDES = phrases(
    """when the news was brought | seeing that all was lost | after a long silence
    | in spite of everything | at the sound of the bell | on the evening of that day
    | without another word | trembling in every limb"""
)


def reflexive(rng: random.Random, turn: int) -> Item:
    """Pair such as "The king threw himself / herself into a chair"."""
    subjects = (("I",), ("he", *MEN), ("she", *WOMEN), ("we",), ("they", "soldiers", "children", "two men"))
    person = turn % len(REFLEXIVES)
    subject = rng.choice(subjects[person])
    subject = subject if subject in ("I", "he", "she", "we", "they") else f"the {subject}"
    wrong = rng.choice([word for word in REFLEXIVES if word != REFLEXIVES[person]])
    verb, after = rng.choice(ACTIONS)
    aside = rng.choice(("", f", {rng.choice(ASIDES)},"))
    return contrast(f"{subject}{aside} {verb}", REFLEXIVES[person], wrong, after)


def possessive_gender(rng: random.Random, turn: int) -> Item:
    """Pair such as "The queen, after a long silence, shook her head / his head"."""
    gender = turn % 2
    acts = forms(
        """shook / head | bowed / head in silence | held out / hand | lost / temper | opened / lips to speak
        | folded / arms | made up / mind to go | did / best to smile | held / breath | bit / lips
        | lost / way in the dark | shrugged / shoulders | took / leave of the company | clasped / hands
        | went down upon / knees"""
    )
    verb, after = rng.choice(acts)
    aside = rng.choice(("", f", {rng.choice(ASIDES)},"))
    before = f"the {rng.choice((MEN, WOMEN)[gender])}{aside} {verb}"
    return contrast(before, ("his", "her")[gender], ("her", "his")[gender], after)


def anaphor(rng: random.Random, turn: int) -> Item:
    """Pair such as "The queen rose from the table, and soon after that she / he left the room"."""
    acts = phrases("rose from the table | came in | heard the news | looked out of the window | stood by the door")
    links = phrases(", and soon after that | , but before | , and as soon as | ; and when | , and at last")
    link = rng.choice(links)
    ends = phrases("left the room | saw the letter | spoke to the servant | went up the stairs")
    end = rng.choice(ends)
    if not link.endswith(("that", "last")):
        end += rng.choice((", the bell rang", ", it was night", ", the rain began"))
    gender = turn % 2
    before = f"the {rng.choice((MEN, WOMEN)[gender])} {rng.choice(acts)}{link}"
    return contrast(before, ("he", "she")[gender], ("she", "he")[gender], end)


# ---------------------------------------------------------------------------- templates: books_grammar


def past_participle(rng: random.Random, turn: int) -> Item:
    """Pair such as "had long since stolen / had long since stole; he stole / he stolen"."""
    verb, after = verb_phrase(rng)
    _, past, participle, _ = verb
    subject = rng.choice(SUBJECTS)
    if turn % 2:
        adverb = rng.choice(("", " never", " already", " long since", " at last"))
        return contrast(f"{subject} had{adverb}", participle, past, after)
    lead = rng.choice(("", "then ", "that day ", "long ago ", "at last "))
    return contrast(f"{lead}{subject}", past, participle, after)


def verb_form(rng: random.Random, turn: int) -> Item:
    """Pair such as "must have stolen / must have stole; was stealing / was stole; would never steal / stole"."""
    verb, after = verb_phrase(rng)
    base, past, participle, ing = verb
    subject = rng.choice(phrases("he | she | the old man | my father | the king | the boy | his wife"))
    kind = turn % 4
    if kind == 0:
        have = rng.choice(phrases("must have | could have | would have | may have | should never have"))
        return contrast(f"{subject} {have}", participle, rng.choice((past, base)), after)
    if kind == 1:
        was = rng.choice(phrases("was | had been | was still | would be"))
        return contrast(f"{subject} {was}", ing, rng.choice((past, base)), after)
    if kind == 2:
        would = rng.choice(phrases("would never | might perhaps | could not | must at once | did not even"))
        return contrast(f"{subject} {would}", base, rng.choice((past, participle)), after)
    without = rng.choice(phrases("went away without | thought of | never dreamed of | was tired of"))
    return contrast(f"{subject} {without}", ing, rng.choice((past, base)), after)


def conditional(rng: random.Random, turn: int) -> Item:
    """Pair such as "If he had gone home, she would / will have known it; If he goes home, she will / would know"."""
    verb, after = verb_phrase(rng)
    _, _, participle, _ = verb
    first = rng.choice(phrases("he | the old man | my father | the king | the boy"))
    second = rng.choice(phrases("she | they | his wife | the servant | everybody"))
    known, know = rng.choice(
        forms("known it / know it | been afraid / be afraid | told me / tell me | seen it / see it")
    )
    if turn % 2:
        return contrast(f"if {first} had {participle} {after}, {second}", "would", "will", f"have {known}")
    comes = rng.choice(phrases("comes back | finds the letter | dies | speaks of it | wants money"))
    return contrast(f"if {first} {comes}, {second}", "will", "would", know)


CONSONANTS = phrases(
    """bishop | cottage | dreadful storm | faithful servant | garden wall | letter from Paris | merchant
    | narrow street | poor widow | quiet evening | rich uncle | terrible battle | violent wind | wooden box
    | great army | beautiful voice | sharp knife | happy marriage | lonely road | mountain path | silver cup
    | deep well"""
)
VOWELS = phrases(
    """orchard | elderly lady | immense crowd | empty purse | innocent man | invisible hand | upper room
    | ugly wound | inn by the road | hour before dawn | honest fellow | admirable plan | excellent dinner
    | iron gate | ancient castle | angry word | unknown land | idle boy | easy death | heir to the throne
    | oak table | English ship"""
)


def article(rng: random.Random, turn: int) -> Item:
    """Pair such as "an orchard / a orchard; a bishop / an bishop"."""
    leads = phrases("it was | I remember | he thought of | she spoke of | they told us of | he dreamed of | we saw")
    vowel = turn % 2
    noun = rng.choice((CONSONANTS, VOWELS)[vowel])
    return contrast(rng.choice(leads), ("a", "an")[vowel], ("an", "a")[vowel], noun)


CASES = forms("I / me | he / him | she / her | we / us | they / them")


def pronoun_case(rng: random.Random, turn: int) -> Item:
    """Pair such as "to my brother and me / and I; when my brother and I came / and me came"."""
    subject, other = CASES[(turn // 2) % len(CASES)]
    brother = rng.choice(phrases("my brother | the old man | her mother | the captain | his friend | the doctor"))
    if turn % 2:
        leads = phrases("spoke to | looked at | came with | sent for | thought of | laughed at | had heard of")
        ends = phrases("in silence | with a smile | for a moment | again and again | at last | in the garden")
        before = rng.choice(phrases("the king | the young lady | the stranger"))
        before = f"{before} {rng.choice(leads)} {brother} and"
        return contrast(before, other, subject, rng.choice(ends))
    leads = phrases("when | as soon as | after | before | long before")
    ends = phrases("came home | saw the house | went away | heard the news | spoke to the king")
    return contrast(f"{rng.choice(leads)} {brother} and", subject, other, f"{rng.choice(ends)}, it was night")


DEGREES = forms(
    """old / older / oldest | young / younger / youngest | great / greater / greatest
    | small / smaller / smallest | strong / stronger / strongest | good / better / best
    | rich / richer / richest | wise / wiser / wisest | bad / worse / worst | long / longer / longest
    | brave / braver / bravest | deep / deeper / deepest"""
)


def comparison(rng: random.Random, turn: int) -> Item:
    """Pair such as "much older than / much oldest than; the oldest of all / the old of all; as old as / as older"."""
    positive, comparative, superlative = rng.choice(DEGREES)
    subject = rng.choice(phrases("he was | she was | it was | this one is | the other was"))
    kind = turn % 4
    if kind == 0:
        ends = phrases("than before | than the other | than I thought | than all the rest")
        wrong = rng.choice((positive, superlative))
        return contrast(f"{subject} {rng.choice(('much', 'far', 'no'))}", comparative, wrong, rng.choice(ends))
    if kind == 1:
        ends = phrases("of them all | that ever was seen | in the whole country | of the three")
        return contrast(f"{subject} the", superlative, positive, rng.choice(ends))
    if kind == 2:
        ends = phrases("as before | as the other | as any of them | as I had thought")
        wrong = rng.choice((comparative, superlative))
        return contrast(f"{subject} as", positive, wrong, rng.choice(ends))
    ends = phrases("than this | than his | than the other | than yours")
    wrong = rng.choice((positive, superlative))
    return contrast("I never had any", comparative, wrong, f"{rng.choice(THINGS)[0]} {rng.choice(ends)}")


def relative_pronoun(rng: random.Random, turn: int) -> Item:
    """Pair such as "the old shepherd who / which came; the lantern which / who had been lost"."""
    before = f"{rng.choice(SUBJECTS)} {rng.choice(SEEN)} the {rng.choice(ADJECTIVES)}"
    number = rng.randrange(2)
    if turn % 2:
        people = (
            *PEOPLE,
            *forms("shepherd / shepherds | fisherman / fishermen | tailor / tailors | monk / monks"),
        )
        ends = phrases("came from the village | had lost everything | lived near us | spoke to you | was killed")
        end = rng.choice(ends[: 5 - number])
        return contrast(f"{before} {rng.choice(people)[number]}", "who", "which", end)
    ends = phrases("stood near the river | had been lost | lay before us | belonged to my father | came from France")
    things = [thing for thing in THINGS if thing[0] not in ("horse", "bird")]
    return contrast(f"{before} {rng.choice(things)[number]}", "which", "who", rng.choice(ends))


# ------------------------------------------------------------------------------ templates: books_order

# One pair an item.
FIXED_ORDER = forms(
    """bread / butter | husband / wife | ladies / gentlemen | brothers / sisters | men / women
    | boys / girls | king / queen | knife / fork | pen / ink | heaven / earth | life / death | good / evil
    | right / wrong | flesh / blood | heart / soul | fire / sword | black / white | north / south
    | east / west | bread / cheese | hill / dale | sun / moon | thunder / lightning | milk / honey
    | needle / thread | shoes / stockings | bows / arrows | law / order | peace / quiet | profit / loss
    | cause / effect | cup / saucer | lock / key | bread / water | odds / ends | ups / downs | arms / legs
    | head / shoulders | eyes / ears | lords / ladies | master / servant | mother / child | man / beast
    | Adam / Eve | Church / State | heaven / hell | ways / means | fear / trembling | father / son
    | sons / daughters"""
)


def order_binomial(rng: random.Random, turn: int) -> Item:
    """Pair such as "bread and butter / butter and bread"."""
    first, second = FIXED_ORDER[turn]
    leads = phrases("he spoke of | they were talking of | it was a matter of | we read of | I was thinking of")
    return contrast(rng.choice(leads), f"{first} and {second}", f"{second} and {first}")


def order_question(rng: random.Random, turn: int) -> Item:
    """Pair such as "What did the old man say? / What the old man did say?"."""
    auxiliary = phrases("did | could | would | can | will | should")[turn % 6]
    subject = rng.choice(phrases("he | she | they | we | you | the old man | my father | your sister"))
    asks = forms(
        """what / say | what / do | what / mean | where / go | where / find it | why / come | how / know
        | how / live | when / return | whom / believe | why / speak of it"""
    )
    word, verb = rng.choice(asks)
    return contrast(word, f"{auxiliary} {subject}", f"{subject} {auxiliary}", f"{verb}?")


def order_particle(rng: random.Random, turn: int) -> Item:
    """Pair such as "took it off / took off it"."""
    del turn
    acts = forms(
        """took / off | put / on | gave / up | threw / away | picked / up | laid / down | sent / back
        | brought / in | led / out | cut / off | carried / away"""
    )
    verb, particle = rng.choice(acts)
    pronoun = rng.choice(("it", "them"))
    return contrast(
        f"{rng.choice(SUBJECTS)} {verb}", f"{pronoun} {particle}", f"{particle} {pronoun}", rng.choice(TAILS)
    )


def order_predeterminer(rng: random.Random, turn: int) -> Item:
    """Pair such as "such a strange story / a such strange story; both his / his both; so fine a / a so fine"."""
    thing = rng.choice(THINGS + RARER)
    adjective = rng.choice(phrases("strange | great | little | beautiful | fine"))
    before = f"{rng.choice(SUBJECTS)} {rng.choice(SEEN)}"
    kind = turn % 4
    if kind == 0:
        return contrast(before, "such a", "a such", f"{adjective} {thing[0]}")
    if kind == 1:
        return contrast(before, "all the", "the all", f"{adjective} {thing[1]}")
    if kind == 2:
        own = rng.choice(("his", "her", "the", "my"))
        return contrast(before, f"both {own}", f"{own} both", thing[1])
    return contrast(before, f"so {adjective} a", f"a so {adjective}", thing[0])


# ------------------------------------------------------------------------------ books_cloze, by hand
# One item a line: the context, a colon, the right ending, three wrong ones. The wrong endings come from the
# same field as the right one (a part of the body for a part of the body), and many are the commoner word.
# What stands in square brackets follows every ending.

GESTURES = """
The old man made no answer, but slowly shook his: head, foot, back, face
She could bear it no longer, and, covering her face with her hands, burst into: tears, sleep, words, fear
He was so angry that he clenched his: fists, eyes, shoulders, heels
The boy fell down before the king upon his: knees, arms, shoulders, ears
She looked up at him with tears in her: eyes, ears, hands, mouth
The sailor took off his cap and scratched his: head, heart, voice, tongue
The lady smiled and held out her: hand, head, foot, eye
Before he spoke he drew a deep: breath, sound, heart, voice
In the silence I could feel the beating of my: heart, head, breath, eyes
At these words the girl turned very: pale, tall, long, deep
He made no reply, but shrugged his: shoulders, hands, eyes, brows
The child threw her arms round her mother's: neck, hand, eyes, foot
He was silent, and bit his: lips, eyes, head, heart
She bent down and kissed the sleeping child upon the: forehead, tongue, heart, voice
The judge frowned and knitted his: brows, eyes, teeth, hands
Without another word he turned upon his: heel, hand, head, eye
The stranger bowed low, with his hand upon his: heart, tongue, tears, teeth
The little girl laughed and clapped her: hands, feet, eyes, lips
To pay the man, he put his hand into his: pocket, mouth, head, eye
The priest lifted up his eyes to: heaven, earth, sleep, bed
Her lips trembled, and for a while she could not: speak, walk, read, hear
He walked up and down the room with his hands behind his: back, ears, face, eyes
When I was tired my mother took me in her: arms, feet, eyes, hair
He rubbed his eyes, as if he had just awakened from a deep: sleep, night, silence, breath
She leaned her head upon his: shoulder, face, eyes, voice
He leaned against the wall and stood there with folded: arms, feet, eyes, ears
The two friends met in the street and shook: hands, heads, arms, eyes
No one could hear her, for she spoke in so low a: voice, word, tongue, mouth
He took the glass and raised it to his: lips, eyes, head, ears
The old woman wiped her eyes with the corner of her: apron, eye, mouth, hand
He sank back in his chair and closed his: eyes, hands, ears, feet
The maid dropped a low: curtsey, prayer, laugh, smile
She fainted, and fell to the ground without a: word, name, face, reason
He embraced her, and pressed her to his: breast, back, feet, mind
"""

IDIOMS = """
Once upon a: time, day, night, year
They were married, and lived happily ever: after, before, since, again
He did not know what to do; he was quite at his wits': end, time, place, head
The night was so dark that he could not see his hand before his: face, back, feet, mind
She had lain awake, and had not closed her eyes all: night, year, life, hour
Make haste, for there is not a moment to: lose, take, find, hold
You may believe me, for I give you my word of: honour, truth, love, death
The fame of his deeds spread far and: wide, long, high, deep
After long doubt he made up his: mind, thought, heart, head
He looked back from time to: time, day, hour, night
The noise grew fainter, little by: little, great, small, more
They had lost their way in the forest, and night was coming: on, off, of, for
He saw the sea for the first time in his: life, mind, age, world
She fell in love with him at first: sight, time, place, hand
It is the prettiest place in the: world, life, time, day
The curate was as poor as a church: mouse, house, man, bell
When they drew him from the water he was more dead than: alive, old, lost, well
He is gone, and we can only pray for the rest of his: soul, mind, heart, face
What is done is done, and it is no use to cry over spilt: milk, wine, water, blood
The king promised the young man the hand of his daughter in: marriage, love, friendship, life
All of us must die, sooner or: later, longer, never, now
He had neither eaten nor drunk since the day: before, after, ago, again
I spoke to her twice, but she pretended not to: hear, tell, say, give
People thought him rich, but he was very poor, as a matter of: fact, truth, word, mind
He was not handsome; but he was brave, on the other: hand, head, foot, way
The ship set sail with a fair: wind, storm, rain, sail
He was not afraid of death, for he had often looked it in the: face, hand, head, mouth
We must be gone at once; there is no time to be: lost, found, gone, taken
The rebels were taken and put to death by order of the: king, crime, death, sword
They fought like lions, and sold their lives: dearly, hardly, nearly, early
She was his only child, and the apple of his: eye, hand, heart, house
The prisoner was found guilty, and was condemned to: death, law, life, crime
I thank you, sir, with all my: heart, hand, head, face
He was so astonished that he could not believe his own: eyes, hands, feet, face
Ride quickly, for it is a matter of life and: death, love, blood, time
I will tell the truth, the whole truth, and nothing but the: truth, lie, word, right
The soldiers rushed forward, sword in: hand, arms, blood, war
I did not mean to hurt you, and I beg your: pardon, reason, sorrow, trouble
I do not like him at all, to tell you the: truth, word, thing, mind
Farewell, my child, and may God bless: you, thou, they, she
It was all over in the twinkling of an: eye, hour, evening, ear
The thief took to his: heels, head, hands, shoes
I never saw such a thing in all my: life, name, mind, world
"""

PREPOSITIONS = """
The child was afraid: of, by, from, with [the dark]
The man had been accused: of, for, with, in [murder]
When she heard it she burst: into, in, for, to [tears]
My uncle was very fond: of, with, for, in [music]
I cannot promise you anything, for it all depends: upon, for, in, to [the weather]
The old people were proud: of, for, with, in [their son]
She turned her head and looked: at, in, by, with [me]
His sister was married: to, of, for, from [a rich merchant]
He did not hear us, for he was lost: in, by, with, for [thought]
They met, and fell: in, into, with, for [love]
All the boys laughed: at, of, to, for [him]
It is absurd, and I have never heard: of, for, in, to [such a thing]
You ought to be ashamed: of, with, in, by [yourself]
The travellers were on their way: to, of, in, by [London]
She went on with her work, and paid no attention: to, for, of, in [him]
The bottle was full: of, with, in, from [water]
He led her away, holding her: by, in, with, from [the hand]
Though I begged him to stay at home, he insisted: upon, for, in, to [going with me]
You know that I am not in the habit: of, for, to, with [telling lies]
He wrote to his father because he was in want: of, for, in, with [money]
She stood at the gate, waiting: for, of, after, to [her brother]
After some talk they all agreed: to, of, for, at [the plan]
I must say that I was much surprised: at, for, of, to [the news]
When he saw her, his heart was filled: with, for, of, in [joy]
A man who lies to his friend is capable: of, for, to, in [anything]
The widow was dressed: in, of, by, at [black]
In those days Rome was at war: with, to, of, for [Carthage]
There was no bread in the town, and many died: of, for, to, in [hunger]
His voice and his smile reminded me: of, to, for, in [my father]
We had our supper, and then went: to, in, for, at [bed]
The enemy came in the night and took the city: by, in, of, for [surprise]
She thanked him again and again: for, of, with, to [his kindness]
Late in the evening they arrived: at, to, of, for [the inn]
For ten years the prisoner was deprived: of, from, for, to [his liberty]
He failed in the end, in spite: of, for, to, in [all his efforts]
The nurse stayed at home to take care: of, to, in, by [the children]
The castle and all the land belonged: to, of, for, in [the duke]
"""

BINOMIALS = """
He could not sit still, but walked up and: down, out, over, away
They did not rest, but travelled day and: night, hour, year, week
The priest declared that they were husband and: wife, child, son, woman
The children had a supper of bread and: butter, flour, corn, oil
He gave himself up to the work, heart and: soul, body, life, head
In the beginning God created the heaven and the: earth, land, world, ground
I thank you for your kindness, ladies and: gentlemen, lords, women, girls
A child of that age should know the difference between right and: wrong, false, bad, ill
The serpent gave them the knowledge of good and: evil, wrong, harm, sin
As the days went by she grew more and: more, less, most, much
He read the letter again and: again, more, over, now
The two sisters went along the road hand in: hand, arm, head, foot
The gentlemen walked up the street arm in: arm, hand, leg, side
They killed all the people of the town, men, women, and: children, boys, ladies, sons
In the wide plain a few trees stood here and: there, where, now, then
Death comes to all men, to the rich and to the: poor, sick, good, great
It is written, honour thy father and thy: mother, wife, son, brother
There it stood, for all to read, in black and: white, red, blue, grey
The enemy laid waste the whole country with fire and: sword, flame, blood, death
The winds blew from the north and from the: south, end, side, land
The roads ran from east to: west, sea, land, side
The crowd had come to see the king and the: queen, lord, woman, wife
When he had eaten enough he laid down his knife and: fork, plate, sword, glass
She wished to write, and asked for paper, pen, and: ink, book, pencil, letter
The stranger was clothed in black from head to: foot, hand, heart, face
She was always at work, from morning till: night, day, time, now
He told them the whole story from first to: last, second, end, least
The guests took their leave and went away, one by: one, two, many, another
At the corner of the street he met his enemy face to: face, hand, eye, head
I must help him, for he is my own flesh and: blood, heart, body, life
She had taken him for better or for: worse, bad, ill, less
Answer me with one word, yes or: no, not, never, none
The lovers were sitting upon the bench side by: side, hand, end, way
The ship was tossed to and: fro, from, back, round
"""

SCENES = """
The ship struck upon a rock, and all the sailors were: drowned, hanged, married, buried
The night was dark, and there was neither moon nor: stars, sky, water, air
He knocked loudly, and after a long while an old servant opened the: door, book, box, letter
The horse threw its rider and galloped away down the: road, river, tree, sea
The evening came, and the sun went down behind the: hills, sky, night, light
He sat down at the table, took up his pen, and began to: write, read, speak, eat
It was winter, and the ground was covered with: snow, flowers, rain, wine
The fire had gone out, and the room was very: cold, warm, bright, hot
The knight sprang into the saddle and rode away upon his: horse, ship, boat, foot
It was Sunday morning, and the people were all going to: church, school, war, sea
The officers were in a rage, and drew their: swords, horses, hands, shoes
He could hardly stand, for he had drunk too much: wine, water, milk, bread
A stranger came to the gate, and the dog began to: bark, speak, sing, write
The doctor felt his pulse, and said that he must stay in: bed, church, school, prison
The old king, with his crown upon his head, sat upon his: throne, head, table, shoulder
It was growing dark, and she lighted the: candle, sun, moon, window
It was past midnight when he put out the light and went to: bed, church, work, school
The hunter saw the wolf, raised his gun, and: fired, ate, spoke, slept
The storm drove the ship upon the: rocks, hills, trees, roads
They dug a hole under the tree and laid the dead man in his: grave, bed, chair, house
He broke the seal of the letter and began to: read, write, ride, pray
The rain fell in torrents, the thunder rolled, and the lightning: flashed, roared, blew, rang
She sat at the window, busy with her needle and: thread, pin, pen, knife
The old woman sat close to the fire, warming her: hands, eyes, hair, words
It was a fine morning in spring, and the birds were singing in the: trees, house, fire, sea
The moon rose, and the stars came out in the: sky, sea, earth, ground
The beggar was hungry, and asked them for something to: eat, say, read, see
The wounded man was thirsty, and begged for a cup of: water, bread, meat, fire
There was no bridge, and a boat carried us across the: river, road, field, bridge
He locked the door and put the key in his: pocket, mouth, head, heart
The child was tired, and soon fell fast: asleep, awake, away, dead
The battle was lost, and the whole army was forced to: retreat, attack, conquer, win
The mother rocked the cradle and sang the child to: sleep, death, school, church
The judge asked the prisoner whether he was guilty or not: guilty, innocent, good, true
He had no money left, for he had spent his last: shilling, word, breath, night
In the spring the fields are full of: flowers, snow, ships, books
The carriage stopped, and the coachman got down and opened the: door, road, horse, street
The farmer rose early and drove his sheep to: market, church, school, sea
It was a fine day, and she put on her hat and went out for a: walk, road, sleep, foot
When the play was over the people all clapped their: hands, eyes, feet, heads
The wind was fair, and the ship spread all her: sails, wings, arms, masts
He was wounded in the battle, and his shirt was red with: blood, wine, fire, shame
They were still talking when the clock struck: twelve, twenty, hundred, first
The cock crew in the yard, and the sun began to: rise, set, fall, sleep
The king was dead, and his eldest son came to the: throne, grave, table, prison
"""


def hand_written(text: str) -> list[Item]:
    """Parse the items of a block of text."""
    items = []
    for line in text.strip().splitlines():
        match = re.fullmatch(r"(?P<context>[^:]+): (?P<endings>[^\[]+?)(?: \[(?P<tail>.+)\])?", line)
        if match is None:
            raise ValueError(f"not a cloze item: {line!r}")
        tail = f" {match['tail']}" if match["tail"] else ""
        items.append(Item(match["context"], tuple(ending + tail for ending in match["endings"].split(", "))))
    return items


# ------------------------------------------------------------------------------------------ the tasks

TEMPLATES: dict[str, tuple[Template, ...]] = {
    "books_agreement": (
        determiner_noun,
        determiner_adjective_noun,
        quantifier_noun,
        subject_verb,
        present_verb,
        reflexive,
        possessive_gender,
        anaphor,
    ),
    "books_grammar": (
        past_participle,
        verb_form,
        conditional,
        article,
        pronoun_case,
        comparison,
        relative_pronoun,
    ),
    "books_order": (
        order_binomial,
        order_question,
        order_particle,
        order_predeterminer,
    ),
}
HAND_WRITTEN: dict[str, dict[str, str]] = {
    "books_cloze": {
        "gesture": GESTURES,
        "idiom": IDIOMS,
        "preposition": PREPOSITIONS,
        "binomial": BINOMIALS,
        "scene": SCENES,
    },
}


def fill(template: Template, rng: random.Random, count: int) -> list[Item]:
    """Make ``count`` different items from a template."""
    items: dict[Item, None] = {}
    for turn in range(count):
        for _ in range(1000):
            item = template(rng, turn)
            if item not in items:
                items[item] = None
                break
        else:
            raise ValueError(f"{template.__name__} cannot make {count} different items")
    return list(items)


def rows(phenomenon: str, items: Sequence[Item], rng: random.Random) -> list[dict[str, object]]:
    """Shuffle the choices of the items, so that every position is right equally often."""
    size = len(items[0].choices)
    positions = [index % size for index in range(len(items))]
    rng.shuffle(positions)
    result: list[dict[str, object]] = []
    for item, gold in zip(items, positions, strict=True):
        if len(item.choices) != size or len(set(item.choices)) != size:
            raise ValueError(f"{phenomenon}: not {size} different choices: {item}")
        right, *wrong = item.choices
        rng.shuffle(wrong)
        choices = [*wrong[:gold], right, *wrong[gold:]]
        result.append({"query": item.query, "choices": choices, "gold": gold, "phenomenon": phenomenon})
    return result


def build(seed: int = SEED) -> dict[str, list[dict[str, object]]]:
    """Make the rows of every task. Each phenomenon has its own random numbers."""
    tasks: dict[str, list[dict[str, object]]] = {}
    for task, templates in TEMPLATES.items():
        tasks[task] = []
        for template in templates:
            name = template.__name__
            rng = random.Random(f"{seed}:{name}")
            tasks[task] += rows(name, fill(template, rng, ITEMS_PER_TEMPLATE), rng)
    for task, blocks in HAND_WRITTEN.items():
        tasks[task] = []
        for name, text in blocks.items():
            tasks[task] += rows(name, hand_written(text), random.Random(f"{seed}:{name}"))
    return tasks


def main() -> None:
    """Write a .jsonl file for each task."""
    parser = argparse.ArgumentParser(description="Write the zero-shot items that ship with the project.")
    default = Path(__file__).resolve().parents[1] / "cfsp" / "assets" / "tasks"
    parser.add_argument("--out", type=Path, default=default, help="folder (default: cfsp/assets/tasks)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}, the items that ship")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task, items in build(arguments.seed).items():
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (arguments.out / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{task}: {len(items)} items")


if __name__ == "__main__":
    main()
