"""Words of fifteen languages, strung together: sounds that English lacks, for a mouth that should not care.

The words are everyday ones, written down for this purpose; their order is random, which no phone minds. Three of the
languages are spelled as they sound, and have words made up as well: any two of their sounds may meet.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_WORDS = {
    "de": "guten Morgen Zug fünf Uhr möchte Tasse Kaffee Pferd läuft Brücke Vögel über Wasser Freund schön "
    "Straße Mädchen wohnen Bäume müde Fenster Pfanne Apfel weiß Buch Himmel wunderbar Familie böse Winter "
    "warum heute Bruder Mutter Vater Küche offen Wolke Schule Schiff Feuer süß früh Mond Blume Boot",
    "fr": "bonjour petit garçon mange pomme bon vin blanc table voudrais feuille papier oiseaux peu beurre "
    "montagne maman papa bateau vélo fenêtre rouge chapeau livre femme homme pluie soleil jour bleu deux "
    "vouloir voiture maison jardin fromage beau bouche pont vent fille plume neuf sœur chambre amour pain",
    "es": "buenos días perro corre calle mañana comer familia quiero guitarra vaso puerta mesa madre padre "
    "puente flor fuego mundo pueblo campo tiempo primo pobre muy mucho poco feliz fiesta fruta vino blanco "
    "música camino amigo mar plaza montaña pan silla tomate mano pie frío",
    "it": "buongiorno oggi andiamo mercato amici famiglia mangia pizza giovedì gnocchi sogno pace azzurro "
    "mamma papà bambino porta finestra fuoco fiume vino bianco pomodoro ponte piove bello bene musica amore "
    "vento uovo scuola campo moglie figlio primavera prima dopo sempre",
    "pt-br": "bom dia menina pão queijo mercado viajar rio muito mel coração filho dois mãe pai porta ponte "
    "fogo flor vinho branco amigo música bonito chuva sol peixe mesa palavra vermelho verde pequeno bolo "
    "manhã noite povo campo família futebol uva fome",
    "pl": "dzień dobry siostra mieszka lubi czytać książki żaba pięć mama tata dom okno woda mleko brat "
    "wiosna piękny miasto morze wiatr kawa herbata most ulica pies kwiat wieczór wino chleb droga moja "
    "babcia zupa ryba pomidor film głowa but wujek",
    "nl": "goedemorgen kinderen spelen buiten tuin huis vrouw leuk ijs meisje duur goud nieuw zacht moeder "
    "vader boom bloem water vuur wind fiets boek brood kaas vriend mooi school weg brug boot appel bij "
    "vandaag morgen winter zomer paard vogel fles",
    "ru": "доброе утро маленькая девочка читает книгу саду жить пять мама папа дом окно вода молоко брат "
    "весна город море ветер кофе чай мост улица собака цветок вечер вино хлеб дорога моя бабушка суп рыба "
    "помидор фильм голова муж ботинок друг",
    "sv": "god morgon flicka köper sju gröna äpplen kärlek hus barn kort ny mamma pappa fönster vatten mjölk "
    "bror vår stad hav vind kaffe bro gata hund blomma kväll bröd väg min mormor soppa fisk film huvud bok "
    "vän båt måne fin",
    "tr": "günaydın küçük kız bahçede kitap okuyor köpek çocuk şeker cam hava anne baba ev pencere su süt "
    "kardeş bahar şehir deniz rüzgar kahve çay köprü sokak çiçek akşam ekmek yol benim babaanne çorba balık "
    "film baş mavi beyaz bugün yumurta",
    "fi": "hyvää huomenta pieni tyttö lukee kirjaa puutarha yö työ suo hauki löyly koulu neuvo mamma pappa "
    "talo ikkuna vesi maito veli kevät kaupunki meri tuuli kahvi silta katu koira kukka ilta leipä tie minun "
    "mummo soppa kala filmi pää puu vene",
    "cs": "dobré ráno malá holčička čte knihu zahrada žába čtyři děti tělo houby maminka táta dům okno voda "
    "mléko bratr jaro město moře vítr káva most ulice pes květ večer víno chléb cesta moje babička polévka "
    "ryba film hlava bota",
    "hu": "jó reggelt kislány könyvet olvas kert gyár tyúk ökör mama papa ház ablak víz tej fivér tavasz "
    "város tenger szél kávé híd utca kutya virág este bor kenyér út nagymama leves hal film fej cipő barát "
    "fehér piros mai meleg",
    "id": "selamat pagi anak kecil itu membaca buku kebun ibu bapak rumah jendela air susu pasar kota laut "
    "angin kopi jembatan jalan anjing bunga malam roti nenek sup ikan film kepala sepatu teman putih merah "
    "mobil pulau pohon bulan",
    "sw": "habari asubuhi mtoto mdogo anasoma kitabu mama baba nyumba dirisha maji maziwa ndugu mji bahari "
    "upepo kahawa daraja barabara mbwa ua jioni mkate njia bibi supu samaki filamu kichwa viatu rafiki "
    "mwezi wimbo pamoja furaha",
}

# What may begin a syllable and what may be its vowel, as spelled; lips show the doubled ones best.
_ONSETS = {
    "it": "p p b b m m f v t d n l r s z c gn sc pr fr br tr st sp qu gu gli",
    "fi": "p p p m m m v v t n l r s k h j",
    "cs": "p p b b m m f v v t d n l r s z š ž č ř c h ch j k pr br st sp mn ť ň",
}
_VOWELS = {
    "it": "a e i o u ia io uo",
    "fi": "a e i o u y ä ö aa ii uu ai au ei oi uo yö ie",
    "cs": "a e i o u á í é ů ou",
}
_CODAS = {"it": "n l r m", "fi": "n s l r m", "cs": "n m l r s t k v p"}
_OPEN_SYLLABLES = 0.75
_MADE_UP = 0.7  # of the words


def invented_sentence(language: str, generator: random.Random) -> str:
    """Four to nine words of `language` (`it`, `fi`, `cs`), most of them made up.

    Raises KeyError for another language.
    """
    onsets, vowels, codas = (part[language].split() for part in (_ONSETS, _VOWELS, _CODAS))
    known = _WORDS[language].split()

    def syllable() -> str:
        coda = "" if generator.random() < _OPEN_SYLLABLES else generator.choice(codas)
        return generator.choice(onsets) + generator.choice(vowels) + coda

    def word() -> str:
        if generator.random() >= _MADE_UP:
            return generator.choice(known)
        return "".join(syllable() for _ in range(generator.choice((1, 2, 2, 3))))

    return _sentence(word, generator)


def foreign_sentence(language: str, generator: random.Random) -> str:
    """Four to nine words of `language` (an espeak-ng name, `de`, `pt-br`).

    Raises KeyError for a language without words here.
    """
    words = _WORDS[language].split()
    return _sentence(lambda: generator.choice(words), generator)


def _sentence(word: Callable[[], str], generator: random.Random) -> str:
    return " ".join(word() for _ in range(generator.randint(4, 9))).capitalize() + "."
