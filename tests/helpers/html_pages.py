"""Pages of HTML that tests read, and a name that must be escaped in them."""

from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
LOADS = {"src", "href", "xlink:href", "data", "poster", "srcset", "action"}
HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>{{ 7*1111 }}"


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers tags with their attributes and the visible text."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.open, self.tags, self.words, self.glued = html, [], [], [], False
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.glued = tag == "wbr"  # what comes belongs to the same word
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            return
        glued, self.glued = self.glued and self.words, False
        if glued:
            self.words[-1] += data
        else:
            self.words.append(data)
