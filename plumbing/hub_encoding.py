"""
The Encoding of a model on the hub, in what it needs besides tiktoken's.
"""
import unicodedata

import tiktoken


class HubEncoding(tiktoken.Encoding):
    """A tiktoken Encoding for which some things need not be as in GPT-2's.

    end: the name of the special token that ends a text. begin: that of the token which every prompt begins
    with, "" for none. normal_form: of Unicode, to which a text is brought first, such as "NFC". chat: a text
    with {} into which every prompt is put, a turn of a chat; "" for none.
    """
    def __init__(self, name, end, begin="", normal_form="", chat="", **parts):
        super().__init__(name, **parts)
        self.more = {"end": end, "begin": begin, "normal_form": normal_form, "chat": chat}
        self.eot_token                                            # a KeyError, if there is no such token
        before, after = (chat or "{}").split("{}")
        self.before = self.encode(begin + before, allowed_special="all")
        self.after = self.encode(after, allowed_special="all")

    @property
    def eot_token(self):
        return self._special_tokens[self.more["end"]]

    def encode_ordinary(self, text):
        form = self.more["normal_form"]
        return super().encode_ordinary(unicodedata.normalize(form, text) if form else text)
