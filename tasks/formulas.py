r"""
Formulas as MATH writes them: the last \boxed{} of a text, and one spelling for the many of a formula.

Of each rule below one must ask which different answers it makes equal. Two losses are wanted, because the
question fixes what is lost, and the benchmark's authors drop it, too: a unit beside a number, and the name
in "x = 5".
"""
import re
from fractions import Fraction

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
UNBRACED = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?|\\[a-zA-Z]+(?:\{[^{}]*\}|\d)*|[^\s$]")


def boxed(text):
    r"""
    Return what stands in the last \boxed or \fbox of a text, or None if there is none that is closed.

    TeX needs no braces. Without them all up to the next dollar counts inside a formula, as in $\boxed 2\pi$,
    and elsewhere one number, command or sign.
    """
    last = None
    for last in BOX.finditer(text):
        pass
    if last is None:
        return None
    start = last.end()
    if not text.startswith("{", start):
        in_formula = (text.count("$", 0, start) - text.count(r"\$", 0, start)) % 2
        end = text.find("$", start) if in_formula else -1
        found = UNBRACED.match(text, start)
        return text[start:end] if end >= 0 else found and found[0]
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1:brace.start()]
    return None


# Words that are units. Words that change a number, such as more, dozen, even or million, are not among them.
LENGTHS = r"inch(?:es)?|in|feet|foot|ft|yards?|miles?|[cmk]m|(?:centi|milli|kilo)?met(?:er|re)s?"
TIMES = r"(?:second|minute|hour|day|week|month|year)s?|sec|min|hrs?"
OTHERS = (r"units?|degrees?|radians?|percent|cents?|dollars?|points?|people|students?|ways|mph|"
          r"(?:milli|kilo)?grams?|kg|lbs?|pounds?|ounces?|oz|tons?|(?:milli)?lit(?:er|re)s?|ml|gallons?")
WORD = rf"(?:(?:square|cubic|sq\.?|cu\.?)[ ])?(?:{LENGTHS}|{TIMES}|{OTHERS})"
SHORT = r"[mgslhL]"                                     # units in \text{} only: 5m is a product
TEXT = r"\\(?:mbox|text[a-z]*|math(?:rm|bf|it|sf))\s*\{"

TOKEN = re.compile(rf"""
    {TEXT}\s*(?P<unit>(?:{WORD}|{SHORT})(?:(?:[ ]per[ ]|/)(?:{WORD}|{SHORT}))?)[\s.]*\}}
    | (?<![a-zA-Z\\])(?P<bare>{WORD})(?![a-zA-Z])
    | (?P<degree>\^\s*(?:\{{\s*\\circ\s*\}}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|°)
    | (?P<percent>\\?%) | (?P<dollar>\\\$)
    | {TEXT}(?P<text>[^{{}}]*)\}}
    | \\(?:begin|end)\{{[a-z]*\}} | \\[a-zA-Z]+ | \\.
    | \d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)? | \d+(?:\.\d+)?
    | \S""", re.DOTALL | re.VERBOSE)
DROPPED = {*r"\! \, \; \: ~ $ \left \right \displaystyle \quad".split(), "\\ ", "\\\n"}
SPELLED = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\lbrace": r"\{",
           r"\rbrace": r"\}", r"\leq": r"\le", r"\geq": r"\ge", r"\neq": r"\ne", "\u2212": "-",
           "π": r"\pi", "∞": r"\infty"}
MARK = "\ue000"                                         # follows a unit


def spell(formula):
    r"""Return the tokens of a formula, each with one blank behind it: "\frac 1 2 " for \dfrac 1 2."""
    spelled = ""
    for token in TOKEN.finditer(formula):
        kind = token.lastgroup
        if kind == "text":
            spelled += spell(token["text"])
        elif kind:
            unit = {"degree": "°", "percent": "%", "dollar": r"\$"}.get(kind) or token[kind].replace(" ", "")
            spelled += f"{unit}{MARK} "
        elif token[0] not in DROPPED:
            spelled += SPELLED.get(token[0], token[0]) + " "
    return spelled


# The rules work on spelled formulas. A number stands alone between FIRST and LAST: 1 and 2 do in (1, 2), the
# digits in 0.\overline{09} or in 10_{02} do not.
OPENED = r"(?:^|(?<=[,(\[=;&<>|] )|(?<=\\[{\\] )|(?<=\\cup )|(?<=\\in )|(?<=rix\} ))"
FIRST = rf"((?:{OPENED}|(?<=\^ \{{ ))(?:- )?)"
LAST = r"(?=$|[,)\]=;&<>|}] |\\[}\\] |\\cup |\\end)"
VALUE = r"((?:(?:[\d.{}^+*/-]\S*|\\frac|\\sqrt|\\pi|\\cdot|\\times) )++)"
POWER = r"(?:\^ \{ [23] \} )?"
ARGUMENT = r"(\d|[a-zA-Z](?=\ )|\\pi|\\infty)(\d*) "     # of a command, without braces: its first sign
NUMERATOR = r"(\\frac \{ (?:[^{}]|\{[^{}]*\})*\} )"


def spell_number(match):
    """Spell 007 as 7, 18.90 as 18.9, and 0.5 as 1/2. A very long decimal stays a decimal."""
    whole, point, rest = match[2].partition(".")
    number = (whole.lstrip("0") or "0") + (point + rest.rstrip("0")).rstrip(".")
    if "." in number and len(number) <= 30:
        number = r"\frac { %d } { %d }" % Fraction(number).as_integer_ratio()
    return f"{match[1]}{number} "


RULES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"(?<!\. )\. $", ""),                                               # the full stop of a sentence
    (rf"(\\frac|\\sqrt|[_^]) {ARGUMENT}", r"\1 { \2 } \3 "),
    (r" {2,}", " "),
    (rf"{NUMERATOR}{ARGUMENT}", r"\1{ \2 } \3 "),
    (r" {2,}", " "),
    (rf"((?:{OPENED})(?:- )?)\\\${MARK} (?=(?:- )?\d)", r"\1"),        # \$5
    (rf"((?:{OPENED})(?:- )?){VALUE}(?<=[\di}}] )\S+{MARK} {POWER}{LAST}", r"\1\2"),
    (rf"(?<=\) )[a-zA-Z]\S*{MARK} {POWER}{LAST}", ""),                   # (1 + \sqrt2)\text{ cm}
    (MARK, ""),
    (r"^[a-zA-Z] (?:=|\\in) (?!.*=)", ""),                               # x = 5, but not x = 5, y = 6
    (r"^\( ([A-Z]) \) $", r"\1 "),                                       # the letter of a choice
    (r"^(- )?(\d+)((?:,\d{3})+)(?=\.|\ $)",
     lambda match: (match[1] or "") + match[2] + match[3].replace(",", "")),
    (r"(?<=\d),(?=\d)", " , "),                                          # (1,234) holds two numbers
    (rf"{FIRST}(\d+) / (\d+) {LAST}", r"\1\\frac { \2 } { \3 } "),
    (rf"{FIRST}\\frac \{{ - (\d+|[a-zA-Z]|\\pi) \}} ", r"\1- \\frac { \2 } "),
    (rf"{FIRST}(\d+(?:\.\d+)?) {LAST}", spell_number),
]]


def normalise(formula):
    r"""Return one spelling for all of a formula, such as 1/2, .5, 0.50, \frac12, 0.5\text{ cm}, x = .5."""
    # thousands, as in 10,\!000
    formula = re.sub(r"(?<=\d)(?:\{,\}|,\s*+\\!|\\,)(?:\s|\\[!,])*+(?=\d{3}(?!\d))", "", formula)
    formula = spell(re.sub(r"(?<![\d.])\.(?=\d|\\overline|\\dot|\\bar)", "0.", formula))
    for pattern, replacement in RULES:
        formula = pattern.sub(replacement, formula)
    return formula.strip()
