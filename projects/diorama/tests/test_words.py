"""What skyloom knows of this world: names of nouns, colours, articles, the probe's labels."""

from diorama.world.nouns import NOUNS, article
from diorama.world.style import COLOURS
from diorama.world.vocabulary import SMALL
from skyloom.models.diorama.probe import Probe, ProbeConfig, load_probe
from skyloom.models.diorama.words import COLOUR_NAMES, THING_NAMES
from skyloom.serve.api.character_prompts import substitute_characters
from skyloom.serve.queue.library import CharacterLikeness


def test_skyloom_recognises_every_noun_and_colour():
    assert {name.lower() for noun in NOUNS.values() for name in noun.names} == THING_NAMES
    assert tuple(COLOURS) == COLOUR_NAMES


def test_the_server_puts_the_article_before_every_noun():
    for noun in NOUNS.values():
        for name in map(str.lower, noun.names):
            for colour in (None, "red", "orange"):
                known = {"Mossy": CharacterLikeness(name, colour)}
                assert substitute_characters("Mossy", known)[0] == article(name, colour)


def test_the_bundled_probe_knows_the_small_vocabulary():
    probe = load_probe()
    assert probe.config.nouns == SMALL.nouns
    assert probe.config.places == SMALL.places
    config = ProbeConfig(SMALL.nouns, SMALL.places, SMALL.times, SMALL.colours)
    assert sum(parameter.numel() for parameter in Probe(config).parameters()) <= 1_500_000
