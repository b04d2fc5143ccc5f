"""The domains that exist out of the box and the words people use for them, as data, and how words are
compared.

What a word does once it is recognised belongs to the routing; which words an operator replaces belongs to the
configuration.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final

Words = Mapping[str, tuple[str, ...]]  # ISO 639-1 language -> words, in the order in which ties are broken

LANGUAGES: Final = ("en", "fr", "rw", "sw")

ALIASES: Final[Mapping[str, str]] = {"mobility": "rides"}

# A keyword anywhere in a sentence can route it, in whatever language the sentence is. Words that are common
# in another sense, or in another language, are left out on purpose: "course" (of course), "ai" (j'ai),
# "work" (it does not work), "policy" (privacy policy), "location".
KEYWORDS: Final[Mapping[str, Words]] = {
    "rides": {
        "en": ("ride", "rides", "taxi", "cab", "driver", "mobility"),
        "fr": ("trajet", "chauffeur", "taxi", "voiture"),
        "rw": ("moto", "tagisi", "urugendo", "umushoferi"),
        "sw": ("teksi", "usafiri", "dereva", "bodaboda"),
    },
    "insurance": {
        "en": ("insurance", "insure", "claim"),
        "fr": ("assurance", "assurer", "sinistre"),
        "rw": ("ubwishingizi", "asiransi"),
        "sw": ("bima", "fidia"),
    },
    "jobs": {
        "en": ("job", "jobs", "vacancy", "hiring"),
        "fr": ("emploi", "travail", "recrutement"),
        "rw": ("akazi", "umurimo", "imirimo"),
        "sw": ("kazi", "ajira"),
    },
    "property": {
        "en": ("property", "house", "apartment", "rent"),
        "fr": ("immobilier", "maison", "appartement", "loyer"),
        "rw": ("inzu", "gukodesha", "ubukode", "ikibanza"),
        "sw": ("nyumba", "pango", "kiwanja"),
    },
    "wallet": {
        "en": ("wallet", "balance", "payment", "pay", "money"),
        "fr": ("portefeuille", "solde", "paiement", "payer", "argent"),
        "rw": ("ikofi", "amafaranga", "kwishyura", "ubwishyu"),
        "sw": ("pochi", "salio", "malipo", "kulipa", "pesa"),
    },
    "marketplace": {
        "en": ("marketplace", "market", "shop", "buy", "sell"),
        "fr": ("marché", "boutique", "acheter", "vendre"),
        "rw": ("isoko", "iduka", "kugura", "kugurisha"),
        "sw": ("soko", "duka", "nunua", "uza"),
    },
    "ai_agents": {
        "en": ("assistant", "chatbot", "advice"),
        "fr": ("assistant", "conseiller", "conseil"),
        "rw": ("umujyanama", "inama", "ubufasha"),
        "sw": ("msaidizi", "mshauri", "ushauri"),
    },
    "profile": {
        "en": ("profile", "account", "settings"),
        "fr": ("profil", "compte", "paramètres"),
        "rw": ("umwirondoro", "konti"),
        "sw": ("wasifu", "akaunti"),
    },
}

MENU: Final[Words] = {
    "en": ("menu",),
    "fr": ("menu",),
    "rw": ("menu", "urutonde"),
    "sw": ("menyu", "orodha"),
}

HOME: Final[Words] = {
    "en": ("home",),
    "fr": ("accueil",),
    "rw": ("ahabanza",),
    "sw": ("mwanzo",),
}

EXIT: Final[Words] = {
    "en": ("exit", "quit", "leave"),
    "fr": ("sortir", "quitter"),
    "rw": ("sohoka", "gusohoka"),
    "sw": ("toka", "ondoka"),
}


def canonical_domain(name: str) -> str:
    """The domain that `name` stands for: "rides" for "mobility", any other name for itself."""
    return ALIASES.get(name, name)


def fold(text: str) -> str:
    """`text` as words are compared: no case, no accents, words apart by single spaces, punctuation dropped.

    >>> fold("  Le MARCHÉ, s'il vous plaît! ")
    'le marche s il vous plait'
    """
    folded = unicodedata.normalize("NFKD", text).casefold()
    kept = (char for char in folded if not unicodedata.combining(char))
    # Vowel signs of some scripts are marks that do not combine: part of the word, though not alphanumeric.
    spaced = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in kept)
    return " ".join("".join(spaced).split())


def chosen_words(defaults: Words, given: Mapping[str, Sequence[str]], languages: Sequence[str]) -> Words:
    """`given` where it names a language, else the defaults, for the configured languages in their order."""
    chosen = {**defaults, **{language: tuple(words) for language, words in given.items()}}
    return {language: chosen[language] for language in dict.fromkeys(languages) if language in chosen}
