"""Opens a page in Chromium, as Qt ships it, without a screen and with the network cut; prints what it found as JSON.

    python tests/learn/browser.py PAGE [PICTURE.png]

    {"loaded": ..., "console": [messages], "asked": [other addresses], "stages": {id: height in pixels},
     "clipped": [what is wider than its box and cannot be scrolled]}

A process of its own: Qt's loop and Chromium end with it. Exits with 3 where Qt's Chromium cannot be loaded.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "QT_QPA_PLATFORM": "offscreen",
    "QTWEBENGINE_DISABLE_SANDBOX": "1",  # it cannot be had as root
    "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu --proxy-server=127.0.0.1:9",  # where nobody listens
}
try:
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineSettings, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication
except ImportError as error:
    print(error)
    sys.exit(3)

SECONDS = 30
LOOK = """JSON.stringify({
  stages: Object.fromEntries([...document.querySelectorAll('section')].map(one => [one.id,
    one.checkVisibility() && one.querySelector('h2').getBoundingClientRect().height > 0
      ? one.getBoundingClientRect().height : 0])),
  clipped: [...document.querySelectorAll('section *')].filter(one => one.closest('svg') === null
    && one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0
    && !one.closest('pre, figure') ).map(one => one.outerHTML.slice(0, 80)),
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        found["console"].append(message)


class Cut(QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, info):
        address = info.requestUrl()
        if address.scheme() not in ("file", "data") or address.toLocalFile() != str(path):
            found["asked"].append(address.toString())
            info.block(True)


def looked(answer):
    found.update(json.loads(answer))
    if len(sys.argv) > 2:
        view.grab().save(sys.argv[2])
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # Qt takes its time to end


def finished(ok):
    found["loaded"] = ok
    QTimer.singleShot(300, lambda: page.runJavaScript(LOOK, looked))


path = Path(sys.argv[1]).resolve()
found = {"loaded": False, "console": [], "asked": []}
application = QApplication(sys.argv[:1])
view, cut = QWebEngineView(), Cut()
page = Page(view)
page.setUrlRequestInterceptor(cut)
# Else Qt would refuse by itself what a page on a disk asks of the network, and nobody would see that it asked.
page.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
view.setPage(page)
view.resize(1000, 2400)
page.loadFinished.connect(finished)
QTimer.singleShot(SECONDS * 1000, lambda: os._exit(4))
view.load(QUrl.fromLocalFile(str(path)))
view.show()
application.exec()
