"""A headless Chromium on the chat page, which waits for what is on the page and never for seconds."""

import contextlib
import json
import shutil
from urllib.parse import urlsplit

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
_WAIT_SECONDS, _TRIES = 600, 3
"""Long enough for any machine: what never happens is shown by the end of the wait, with what was waited for."""
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server", "--disable-gpu"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars"),
)


def is_installed():
    """Whether Debian's chromium and chromium-driver are there."""
    return bool(shutil.which(CHROMIUM) and shutil.which(DRIVER))


def _start(open_browser):
    """Opens a browser; once more if a slow machine did not start it in the minute that chromedriver allows.

    Chromedriver's path is given, so that Selenium does not look for a driver in the network.
    """
    from selenium.common.exceptions import WebDriverException

    for attempt in range(1, _TRIES + 1):
        try:
            driver = open_browser()
            break
        except WebDriverException:
            if attempt == _TRIES:
                raise
    driver.command_executor.client_config.timeout = _WAIT_SECONDS
    driver.set_page_load_timeout(_WAIT_SECONDS)
    driver.set_script_timeout(_WAIT_SECONDS)
    return driver


class Browser:
    """One person's browser."""

    def __init__(self, url, size=(1280, 900), *flags):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*_FLAGS, f"--window-size={size[0]},{size[1]}", *flags):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = _start(lambda: webdriver.Chrome(options=options, service=Service(DRIVER)))
        self._messages = []
        self.url = url
        self.open()

    def open(self):
        """Opens the page, anew if it is open."""
        self.driver.get(self.url)
        self.wait(lambda: self.find("#say textarea"))
        self.script(
            """
            const look = () => {
              const answering = [...document.querySelectorAll("#say button")].some(button => button.innerText == "Stop")
              window.taken += answering && !window.answering
              window.answering = answering
            }
            window.taken = 0
            new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true})
            """
        )

    def close(self):
        self.driver.quit()

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition, what=""):
        """What a condition gives once it is true; elements that are replaced meanwhile are looked for again."""
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, _WAIT_SECONDS, 0.05, [StaleElementReferenceException])
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException:
            shown = self.script("return document.body.innerText")
            asked = [urlsplit(url).path for url, _ in self.requests()][-8:]
            raise AssertionError(f"{what or 'The page did not change'}: {shown!r}, asked last for {asked}") from None

    def answers(self, side="left"):
        """The texts of the answers that a chat shows."""
        return self.script(
            "return [...document.querySelectorAll(`#${arguments[0]} .bot.message`)].map(e => e.innerText.trim())", side
        )

    def wait_for_answer(self, text, side="left"):
        self.wait(lambda: any(text in answer for answer in self.answers(side)), f"no answer with {text!r}")

    def status(self):
        return self.script("return document.querySelector('#status')?.innerText ?? ''")

    def wait_for_status(self, text):
        self.wait(lambda: text in self.status(), f"no status with {text!r}")

    def wait_for_warning(self, text):
        self.wait(lambda: any(text in toast.text for toast in self.find(".toast-body")), f"no warning with {text!r}")

    def hold(self, end):
        """Keeps every request to an address with this end waiting for ever."""
        self.script(
            """
            const [end] = arguments, send = window.fetch
            window.fetch = (to, ...rest) =>
              String(to.url ?? to).endsWith(end) ? new Promise(() => {}) : send(to, ...rest)
            """,
            end,
        )

    def lag(self, text):
        """Opens a page that, while an answer streams, hears of an event of its own only once a text was sent for that.

        `window.lagged` counts how often.
        """
        script = """
            const text = %s, send = window.fetch
            let streamed = "", isOpen = false
            window.lagged = 0
            window.fetch = async (to, ...rest) => {
              const response = await send(to, ...rest), {pathname} = new URL(to.url ?? to, location)
              if (pathname.endsWith("/queue/data")) {
                const [given, read] = response.body.tee()
                const reader = read.pipeThrough(new TextDecoderStream()).getReader()
                const ended = () => { isOpen = false }
                const keep = ({done, value}) => {
                  streamed += value ?? ""
                  return done ? ended() : reader.read().then(keep)
                }
                isOpen = true
                reader.read().then(keep).catch(ended)
                return new Response(given, response)
              }
              if (pathname.endsWith("/queue/join")) {
                const {event_id} = await response.clone().json()
                const sent = text => streamed.split("\\n").some(line => line.includes(event_id) && line.includes(text))
                while (isOpen && !sent(text) && !sent("process_completed"))
                  await new Promise(done => setTimeout(done, 20))
                window.lagged += sent(text)
              }
              return response
            }
            """
        source = "{" + script % json.dumps(text) + "}"
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.open()

    def watch(self, text):
        """Notes from now on whether a message ever shows a text; `seen` says so."""
        self.script(
            """
            const [text] = arguments, look = () => document.querySelectorAll("#chats .message")
              .forEach(message => { window.seen ||= message.innerText.includes(text) })
            window.seen = false
            new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true})
            """,
            text,
        )

    def seen(self):
        return self.script("return window.seen")

    def is_ready(self):
        """Whether nothing is being answered: the button says Send."""
        return any(button.text == "Send" for button in self.find("#say button"))

    def say(self, text):
        """Says something, and waits until an answer is begun: until then the page looks as if it were answered."""
        box = self.wait(lambda: self.is_ready() and self.find("#say textarea")[0])
        taken = self.script("return window.taken")
        box.send_keys(text + "\n")
        self.wait(lambda: self.script("return window.taken") > taken, f"{text!r} was not taken")

    def click(self, selector):
        """Clicks the last of the elements, once it is there."""
        element = self.wait(lambda: self.find(selector), f"no {selector}")[-1]
        self.script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)

    def requests(self):
        """Every address that the page asked for, and why it was blocked if it was."""
        self._messages += [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked, blocked = {}, {}
        for message in self._messages:
            parameters = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                asked[parameters["requestId"]] = parameters["request"]["url"]
            elif message["method"] == "Network.loadingFailed":
                blocked[parameters["requestId"]] = parameters.get("blockedReason", "")
        return [(url, blocked.get(request, "")) for request, url in asked.items()]

    def elsewhere(self):
        """Requests that left for another host than the page's and were not blocked."""
        own, inner = urlsplit(self.url).hostname, ("data", "blob", "chrome")
        sent = [urlsplit(url) for url, reason in self.requests() if reason != "csp"]
        return [url.geturl() for url in sent if url.scheme not in inner and url.hostname != own]


@contextlib.contextmanager
def browser(url, *arguments):
    opened = Browser(url, *arguments)
    try:
        yield opened
    finally:
        opened.close()
