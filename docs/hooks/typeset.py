"""LaTeX of the formulas that docstrings write in plain text, and its HTML."""

import html
import re
from collections.abc import Callable

GREEK = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "theta", "kappa", "lambda", "mu", "nu", "phi", "pi", "psi", "rho"),
    *("sigma", "tau", "Gamma", "Lambda", "Omega", "Phi", "Sigma"),
]
SYMBOLS = {name: f"\\{name}" for name in GREEK} | {"lam": r"\lambda", "eps": r"\varepsilon", "I": "I", "in": r"\in "}
FUNCTIONS = {"log", "max", "min", "cos", "sin", "cosh", "sinh", "tanh", "exp", "det"}
OPERATORS = {
    *("argmax", "argmin", "concat", "cov", "diag", "floor", "logit", "mean", "relu", "sg", "sigmoid", "sign", "stop"),
    *("stopgrad", "tr", "var"),
}
# of two letters or more, but not English
NAMES = {*GREEK, *SYMBOLS, *FUNCTIONS, *OPERATORS, "sqrt", "sum", "prod", "xhat", "zhat", "rhohat", "cs", "nll"}
SIGNS = {
    "...": r"\ldots ",
    "<-": r"\gets ",
    ":=": r"\mathrel{:=}",
    ">=": r"\ge ",
    "<=": r"\le ",
    "!=": r"\ne ",
    "->": r"\to ",
    "||": r"\|",
    "..": r"\ldots ",
    "{": r"\{",
    "}": r"\}",
    "#": r"\#",
}
TOKEN = re.compile(r"\s+|MS-SSIM|[A-Za-z]+|\d+(?:\.\d+)?(?:e-?\d+)?|>=|<=|!=|->|<-|:=|\|\||\.\.\.?|`[^`]*`|.")
# what makes a part of a line a formula
RELATION = re.compile(r"[=~]|[<>]|^[+-] |^(log|sum)\b|^\d+ ?[a-z]+\(")
# one symbol in a sentence, such as x~, L_iso, q(z|x) or N(0, I)
SYMBOL = rf"(?:xhat|zhat|KL|ELBO|MMD|{'|'.join(GREEK)}|[A-Za-z])"
SCRIPT = r"(?:\([^()\s]+\)|\{[^{}]*\}|[A-Za-z]{1,4}(?![\w(])|\d+)"
MARK = rf"(?:_hat|[~^](?![\w({{])|'(?![A-Za-z])|[_^]{SCRIPT})"
CALL = r"\((?:[\w|~^', ]*[|~^_][\w|~^', ]*|[a-z]|0, I)\)"
IN_TEXT = re.compile(
    rf"(?<![\w|/.`^~'&#-])(?:-?log )?{SYMBOL}{MARK}*(?:{CALL}{MARK}*)?(?![\w|(\[/^~`'&-]|\.\w)|"
    r"(?<![\w.^])\d+\^(?:\d+|[a-z]+)|`[^`]*`|https?://\S+"
)
# words of English, and names that stay as they are
WORDS = {"a", "A", "I", "KL", "ELBO", "MMD", "Gamma", "Lambda", "Omega", "Phi", "Sigma"}


class _Reader:
    """Reads a formula from left to right."""

    def __init__(self, text: str) -> None:
        # s_n+1 is s with the index n + 1, s^1/7 the seventh root, z_q,d an element of z_q
        text = re.sub(r"_([A-Za-z][+-]1)\b", r"_{\1}", text)
        text = re.sub(r"\^(-?\d/\d|-\d)", r"^{\1}", text)
        text = re.sub(r"_([a-z],[a-z])\b", r"_{\1}", text)
        text = re.sub(r"_([XZ]->[XZ])", r"_{\1}", text)
        text = re.sub(r"_(<[a-z])\b", r"_{\1}", text).replace("dtheta", "d theta")
        self.tokens = TOKEN.findall(text)
        self.at = 0
        # whether each open bracket is that of a function, in which a bar is a condition
        self.calls: list[bool] = []

    def peek(self, ahead: int = 0) -> str:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def all(self, end: str = "") -> str:
        out, depth = [], len(self.calls)
        while self.at < len(self.tokens) and not (end and self.peek() == end and len(self.calls) == depth):
            out.append(self.one())
        return "".join(out)

    def prose(self, at: int) -> bool:
        """Whether the token at this place is a word of English."""
        token, after, follower = (*self.tokens[at : at + 3], "", "", "")[:3]
        if token.startswith("`"):
            return True
        if token in ("a", "in"):
            return after == " " and len(follower) > 1 and self.prose(at + 2)
        if token in ("mean", "sum"):
            return after == " " and follower in ("of", "over")
        known = len(token) == 1 or token in NAMES or re.fullmatch(r"d[fghlmqtxyz]", token)
        return token.isalpha() and token[1:].islower() and not known and after not in ("(", "_", "^", "~", "[")

    def text(self) -> str:
        """A run of words."""
        before, last = (["", "", *self.tokens])[self.at : self.at + 2]
        out = (" " if last == " " and before not in ("=", "+") else "") + self.take().strip("`")
        while self.at < len(self.tokens):
            glue = ", " if self.peek() == "," and self.peek(1) == " " else self.peek()
            word = self.peek(len(glue))
            more = glue in (" ", "-", ", ") and word and (word == "in" or self.prose(self.at + len(glue)))
            if not (more or (glue, word) == ("'", "s")):
                break
            self.at += len(glue) + 1
            out += glue + word.strip("`")
        return rf"\text{{{out}{' ' * (self.peek() == ' ')}}}".replace("_", r"\_")

    def one(self) -> str:
        if self.prose(self.at):
            return self.text()
        token = self.take()
        if token.isspace():
            return r"\; " if len(token) > 1 and self.peek() else " "
        if token[0].isalpha():
            return self.word(token)
        if token in "([":
            before = self.tokens[self.at - 2] if self.at > 1 else " "
            self.calls.append(token == "(" and bool(re.fullmatch(r"[A-Za-z\d~'^]+", before)))
            return token
        if token in ")]":
            if self.calls:
                self.calls.pop()
            return token + self.scripts()
        spaced = self.tokens[self.at - 2 : self.at + 1] == [" ", "|", " "]
        if token == "|" and (spaced or (self.calls and self.calls[-1])):
            return r" \mid "
        if token == "'" and self.peek() == "s" and not self.peek(1).strip("., "):
            self.take()
            return r"\text{'s}"
        if token == "~":
            return r"\sim "
        if token == "." and self.peek() == " " and self.peek(-2) == " ":
            return r"\cdot "
        if token == "||":
            return SIGNS[token] + (self.scripts() if not self.peek(-2).isspace() else "")
        if found := re.fullmatch(r"(\d+)e(-?\d+)", token):
            return (rf"{found[1]} \cdot " if found[1] != "1" else "") + f"10^{{{found[2]}}}"
        if token[0].isdigit():
            if self.peek() == "/" and re.fullmatch(r"[A-Za-z]|\d+", self.peek(1)) and self.peek(2) not in ("_", "^"):
                self.take()
                return rf"\tfrac{{{token}}}{{{self.take()}}}"
            return token + self.scripts()
        return SIGNS.get(token, token)

    def word(self, name: str) -> str:
        """A name with its hat, tilde, primes, subscripts and superscripts."""
        if name == "E" and self.peek() == "_" and self.peek(2) not in (",", ")"):
            self.take()
            return rf"\mathbb{{E}}_{{{self.distribution()}}}"
        words = [name]
        while (
            name[-1].islower()
            and self.peek() == "_"
            and len(self.peek(1)) > 2
            and self.peek(1).isalpha()
            and not (name == "max" and self.peek(1) in SYMBOLS)
            and (
                len(words) > 1
                or (len(name) > 1 and name.islower() and name not in {*SYMBOLS, "dz", "sum", "prod", "mean"})
            )
        ):
            self.take()
            words.append(self.take())
        if len(words) > 1:
            return r"\mathrm{" + r"\_".join(words) + "}"
        if name == "E" and self.peek() in ("[", " ") and self.peek(1) != ")":
            return r"\mathbb{E}" + ("\\," if self.peek() == " " else "")
        if name in ("sum", "prod"):
            return rf"\{name}" + (self.scripts() or " ")
        if name == "o" and self.peek() == " " and self.peek(-2) == " ":
            return r"\circ"
        if name == "sqrt" and self.peek() == "(":
            self.take()
            self.calls.append(True)
            inner = self.all(")")
            self.calls.pop()
            self.take()
            return rf"\sqrt{{{inner}}}" + self.scripts()
        if name == "N" and self.peek() == "(":
            return r"\mathcal{N}"
        if name in FUNCTIONS:
            return rf"\{name}" + (self.scripts() or " ") + self.gap()
        if name in OPERATORS:
            return rf"\operatorname{{{name}}}" + self.scripts() + self.gap()
        hat = ""
        if name.endswith("hat") and len(name) > 3:
            name, hat = name[:-3], r"\hat"
        if self.peek() == "_" and self.peek(1) == "hat":
            self.at += 2
            hat = r"\hat"
        if self.peek() == "~":
            self.take()
            hat = r"\tilde"
        if self.peek() == "^" and not re.match(r"[A-Za-z\d({<+-]", self.peek(1)):
            self.take()
            hat = r"\hat"
        base = SYMBOLS.get(name) or (name if len(name) == 1 else self.long(name))
        written = f"{hat}{{{base}}}" if hat else base
        if len(name) == 1 and self.peek().isdigit():
            return f"{written}_{{{self.take()}}}"
        return written + (self.scripts() or (" " if name in SYMBOLS else ""))

    def gap(self) -> str:
        """The space between a function and its argument, which MathML does not have by itself."""
        return r"\hspace{0.17em}" if self.peek() == " " and self.peek(1) not in ("=", "-", "+") else ""

    def long(self, name: str) -> str:
        if re.fullmatch(r"d[A-Za-z]|MK", name):
            return name
        return rf"\operatorname{{{name}}}" if name.islower() and self.peek() in ("(", "[") else rf"\mathrm{{{name}}}"

    def scripts(self) -> str:
        out = ""
        while self.peek() in ("_", "^", "'"):
            mark = self.take()
            if mark == "'":
                out += mark
            elif out.count(mark):
                # a subscript of the subscript or of the superscript
                out = f"{out[:-1]}{mark}{{{self.script()}}}}}"
            else:
                out += f"{mark}{{{self.script()}}}"
        return out

    def script(self) -> str:
        token = self.take()
        if token in "({":
            inner = self.all(")" if token == "(" else "}")
            if self.at < len(self.tokens):
                self.take()
            return inner.strip()
        if token.isalpha():
            tilde = self.peek() == "~" and self.take()
            name = SYMBOLS.get(token) or (token if len(token) < 3 or token == "kjj" else rf"\mathrm{{{token}}}")
            return rf"\tilde{{{name}}}" if tilde else name
        return token

    def distribution(self) -> str:
        """What an expectation is over, such as q, q_i, q(z|x) or sg(q)."""
        name = self.take()
        if name in ("(", "{"):
            self.at -= 1
            return self.script()
        base = (
            rf"\operatorname{{{name}}}"
            if name in OPERATORS
            else SYMBOLS.get(name, name if len(name) == 1 else rf"\mathrm{{{name}}}")
        )
        if self.peek() == "~":
            self.take()
            base = rf"\tilde{{{base}}}"
        if self.peek() == "_":
            self.take()
            base += f"_{{{self.take()}}}"
        if self.peek() == "'":
            base += self.take()
        while self.peek() == "(":
            self.take()
            self.calls.append(True)
            base += f"({self.all(')')})"
            self.calls.pop()
            self.take()
            # q(x)q(z), independent draws
            base += self.take() if self.peek().isalpha() else ""
        return base


def latex(formula: str) -> str:
    """The LaTeX of a formula in the notation of the models' docstrings."""
    return re.sub(r" +", " ", _Reader(formula.strip()).all()).strip()


def parts(line: str) -> list[tuple[bool, str]]:
    """The parts of an indented line, which three spaces separate, each with whether it is a formula."""
    found = [part for part in re.split(r"\s{3,}", line.strip()) if part]
    return [(bool(RELATION.search(part)) and "//" not in part, part) for part in found]


def symbols(text: str) -> list[tuple[bool, str]]:
    """A sentence in pieces, each with whether it is a symbol, such as x~ or q(z|x)."""
    out, end = [], 0
    for found in IN_TEXT.finditer(text):
        if found[0][0] != "`" and "//" not in found[0] and found[0] not in WORDS:
            out += [(False, text[end : found.start()]), (True, found[0])]
            end = found.end()
    return [piece for piece in (*out, (False, text[end:])) if piece[1]]


# ---- HTML ------------------------------------------------------------------------------------------------------------

# a block of code without a language; code, titles and tags, in which nothing is typeset; text
HTML_PIECE = re.compile(
    r'<div class="language-text highlight"><pre><span></span><code>(?P<block>[^<]*)</code></pre></div>|'
    r"<(?P<tag>code|pre|h[1-6])\b.*?</(?P=tag)>|<[^>]*>|(?P<text>[^<]+)",
    re.DOTALL,
)


def element(text: str, tag: str) -> str:
    """An element that the script of the pages typesets: a div as a line of its own, a span within a sentence."""
    # Markdown would read what is special to it within a sentence
    written = re.sub(r"[^\w\s]", lambda found: f"&#{ord(found[0])};", latex(text)).replace("_", "&#95;")
    return f'<{tag} class="formula">{written}</{tag}>'


def block(lines: list[str]) -> str:
    """The HTML of indented lines; empty if none of them has a formula."""
    rows = [parts(line) for line in lines]
    if not any(formula for row in rows for formula, _ in row):
        return ""
    cells = ["".join(element(text, "div") if formula else f"<div>{words(text)}</div>" for formula, text in row)
             for row in rows]  # fmt: skip
    return '<div class="formulas">' + "".join(f"<div>{row}</div>" for row in cells) + "</div>"


def words(text: str) -> str:
    """The HTML of words beside formulas."""
    return with_symbols(text, lambda plain: re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(plain)))


def with_symbols(text: str, written: Callable[[str], str], only: str = "") -> str:
    """The HTML of a sentence with its symbols typeset, or only those that match a pattern.

    `written` gives the HTML of everything else.
    """
    done = "".join(
        element(piece, "span") if formula and re.search(only, piece) else written(piece)
        for formula, piece in symbols(text)
    )
    # browsers break lines between a formula and the punctuation after it
    return re.sub(r'(<span class="formula">[^<]*</span>)([.,;:)]+)', r'<span class="unbroken">\1\2</span>', done)


def in_html(content: str) -> str:
    """The HTML of docstrings with their formulas typeset.

    A formula is an indented block that is not Python code or, in a sentence, a distribution or a power, such as q(z|x)
    or 2^24. Single letters stay as they are, because most of them are sizes in shapes, such as (B, *input_shape).
    """

    def written(found: re.Match[str]) -> str:
        if found["block"]:
            text = html.unescape(found["block"]).rstrip("\n")
            return found[0] if _is_python(text) else block(text.split("\n")) or found[0]
        if found["text"]:
            plain = html.unescape(found["text"])
            return with_symbols(plain, lambda piece: html.escape(piece, quote=False), only=r"[(^]")
        return found[0]

    return HTML_PIECE.sub(written, content)


def _is_python(text: str) -> bool:
    try:
        compile(text, "", "exec")
    except SyntaxError:
        return False
    return True
