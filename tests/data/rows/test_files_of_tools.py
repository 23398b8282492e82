"""Files in the shape of more tools, three or more of each kind: read right, or refused by a message that names why."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from kto_jax.config import ConfigError, DataConfig
from kto_jax.data.rows.records import Feedback, Preference, read_records

Q, R = {"role": "user", "content": "Q"}, {"role": "user", "content": "R"}
A, B = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
S = {"role": "system", "content": "S"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]


def rows(*objects):
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects).encode()


def chat_ui(**fields):
    said = [("1", "user", "Q", []), ("2", "assistant", "A", ["1"]), ("3", "assistant", "B", ["1"])]
    messages = [{"id": i, "from": who, "content": text, "ancestors": above} for i, who, text, above in said]
    return {"_id": "c", "title": "T", "messages": [messages[0], {**messages[1], "score": -1, **fields}, messages[2]]}


def webui_chat(*ratings, **fields):
    tree = {"q": {**Q, "id": "q", "parentId": None}}
    for number, rating in enumerate(ratings):
        mark = {} if rating is None else {"annotation": {"rating": rating, "reason": "x"}}
        tree[f"a{number}"] = {**A, "content": f"A{number}", "id": f"a{number}", "parentId": "q", **mark, **fields}
    return {"id": "c", "title": "T", "chat": {"history": {"messages": tree, "currentId": "a0"}}}


def flowise(role, text, **fields):
    return {"role": role, "content": text, "chatId": "c", **fields}


def cells(*lines, encoding="utf-8"):
    return "\r\n".join(lines).encode(encoding)


UP = {"prompt": "Q", "completion": "A", "label": True}
ASKED = json.dumps({"model": "m", "messages": [S, Q]})
ANSWERED = json.dumps({"id": "1", "choices": [{"index": 0, "message": A}]})
GRADIO = {"conversation": json.dumps([{**Q, "metadata": None}, A, R, B]), "value": "Dislike"}
# Kind, tool, name of the file, content, settings, and what is read: of a row that is rejected, its reason.
FILES = [
    # Thumbs of chat programs.
    ("thumbs", "Hugging Face chat-ui", "c.jsonl", rows(chat_ui()), {"label_field": "score", "label_map": {"-1": False}},
     [([Q], "A", False)]),
    ("thumbs", "Open WebUI, chats", "c.json", json.dumps([webui_chat(1, None, -1)]).encode(), {},
     [([Q], "A0", True), "an answer without a rating", ([Q], "A2", False)]),
    ("thumbs", "Open WebUI, sources", "c.jsonl", rows(webui_chat(1, sources=[{"x": 1}])), {},
     ["the answer has 'sources', whose text the model read and the export does not hold"]),
    ("thumbs", "Gradio", "log.csv", cells(
        "conversation,index,value", '"' + GRADIO["conversation"].replace('"', '""') + '",1,Like'), {},
     [([Q], "A", True)]),
    ("thumbs", "Gradio, pairs", "log.jsonl", rows(
        {"conversation": [["Q", "A"], ["R", "B"]], "index": [1, 1], "value": "Dislike"},
        {"conversation": [["Q", "A"]], "index": [4, 1], "value": "Like"},
        {"conversation": [{**A, "metadata": {"title": "Search"}}], "index": 0, "value": "Like"}), {},
     [([Q, A, R], "B", False), "index '[4, 1]' is no message of the conversation", "displays 'Search'"]),
    ("thumbs", "Flowise", "chat.json", json.dumps([{"chatId": "c", "messages": [
        flowise("userMessage", "Q"), flowise("apiMessage", "A", feedback={"rating": "THUMBS_DOWN", "content": "no"})]}]
     ).encode(), {"roles": {"userMessage": "user", "apiMessage": "assistant"}, "label_map": {"THUMBS_DOWN": False}},
     [([Q], "A", False)]),
    ("thumbs", "Flowise, as it is", "chat.jsonl", rows({"messages": [
        flowise("userMessage", "Q"), flowise("apiMessage", "A", feedback={"rating": "THUMBS_UP"})]}), {},
     ["data.roles={'apiMessage': 'assistant'} maps it"]),
    ("thumbs", "Dify", "logs.jsonl", rows(
        {"id": "1", "conversation_id": "c", "query": "Q", "answer": "A", "feedback": {"rating": "like"}}), {},
     "config.data.prompt_field='query' with config.data.completion_field='answer' with "
     "config.data.label_field='feedback.rating' reads it"),
    ("thumbs", "Chainlit", "threads.jsonl", rows({"id": "t", "steps": [
        {"type": "user_message", "output": "Q"}, {"type": "assistant_message", "output": "A", "feedback": {"value": 1}}
     ]}), {}, "The columns are 'id', 'steps'"),
    # Conversations with a label, and for supervised tuning.
    ("conversations", "NeMo", "n.jsonl", rows({"system": "S", "mask": "User", "conversations": [
        {"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A"}]}),
     {"format": "demonstrations", "system_field": "system"}, [([S, Q], "A", True)]),
    ("conversations", "ms-swift", "s.jsonl", rows({"messages": [Q, {**A, "loss": False}, R, {**B, "loss": True}]}),
     {"format": "demonstrations"}, ["a turn whose 'loss' is false", ([Q, A, R], "B", True)]),
    ("conversations", "axolotl", "x.jsonl", rows({"conversations": [
        {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "train": False}]}),
     {"format": "demonstrations"}, ["a turn whose 'train' is false"]),
    ("conversations", "Claude, export", "c.json", json.dumps([{"uuid": "c", "chat_messages": [
        {"uuid": "1", "sender": "human", "text": "Q"}, {"uuid": "2", "sender": "assistant", "text": "A"}]}]).encode(),
     {"format": "demonstrations"}, "The columns are 'uuid', 'chat_messages'"),
    ("conversations", "one object of ShareGPT", "one.json", json.dumps(
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "kto_tag": True}, indent=1
     ).encode(), {}, [([Q], "A", True)]),
    # Pairs.
    ("pairs", "LLaMA-Factory", "p.json", json.dumps([{
        "conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"}}]).encode(),
     {"format": "pairs", "prompt_field": "conversations"}, [([Q], "A", "B")]),
    ("pairs", "ms-swift", "p.jsonl", rows({"messages": [Q, A], "rejected_response": "B"}),
     {"format": "pairs", "chosen_field": "messages", "rejected_field": "rejected_response"}, [([Q], "A", "B")]),
    ("pairs", "Orca", "p.jsonl", rows({"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}),
     {"format": "pairs", "prompt_field": "question", "system_field": "system"}, [([S, Q], "A", "B")]),
    # Thoughts and calls of tools, in fields of their own.
    ("fields of messages", "Ollama", "o.jsonl", rows({"messages": [Q, {**A, "thinking": "T"}], "label": True}), {},
     [([Q], {**A, "reasoning_content": "T"}, True)]),
    ("fields of messages", "OpenAI's functions", "f.jsonl", rows(
        {"messages": [Q, {**A, "function_call": {"name": "f", "arguments": '{"a": 1}'}}], "label": True}), {},
     [([Q], {**A, "tool_calls": CALL}, True)]),
    ("fields of messages", "LangChain", "l.jsonl", rows({
        "inputs": {"messages": [{"type": "human", "data": {"content": "Q"}}]},
        "outputs": {"type": "ai", "data": {"content": "A", "additional_kwargs": {"reasoning_content": "T"}}},
        "feedback_stats": {"thumb": {"n": 1, "avg": 1.0}}}), {}, [([Q], {**A, "reasoning_content": "T"}, True)]),
    # What is not text.
    ("attachments", "Ollama", "i.jsonl", rows({"messages": [{**Q, "images": ["aGk="]}, A], "label": True}), {},
     ["message of the prompt has 'images', which is not text"]),
    ("attachments", "chat-ui", "i.jsonl", rows(chat_ui(files=[{"type": "hash"}])),
     {"label_field": "score", "label_map": {"-1": False}}, ["message of the completion has 'files'"]),
    ("attachments", "Vercel", "i.jsonl", rows(
        {"messages": [{**Q, "experimental_attachments": [{"url": "x"}]}, A], "label": True}), {},
     ["message of the prompt has 'experimental_attachments'"]),
    ("attachments", "LibreChat", "i.jsonl", rows({"messages": [
        {"messageId": "1", "isCreatedByUser": True, "text": "Q", "files": [{"file_id": "x"}]},
        {"messageId": "2", "parentMessageId": "1", "isCreatedByUser": False, "text": "A",
         "feedback": {"rating": "thumbsUp"}}]}), {}, ["a message has files"]),
    # Requests and answers that are kept as text.
    ("JSON as text", "LiteLLM", "l.csv", cells("request,response,label", ",".join(
        '"' + text.replace('"', '""') + '"' for text in (ASKED, ANSWERED)) + ",up"),
     {"prompt_field": "request", "completion_field": "response", "label_map": {"up": True}}, [([S, Q], "A", True)]),
    ("JSON as text", "MLflow", "m.jsonl", rows({"request": ASKED, "response": json.dumps(A), "good": False}),
     {"prompt_field": "request", "completion_field": "response", "label_field": "good"}, [([S, Q], "A", False)]),
    ("JSON as text", "a request with tools", "t.jsonl", rows(
        {"prompt": json.dumps({"messages": [Q], "tools": CALL}), "completion": "A", "label": True}), {},
     ["prompt is not text but an object with 'messages', 'tools'"]),
    ("JSON as text", "answers that are JSON", "j.jsonl", rows(
        {"prompt": "Q", "completion": '{"messages": 3}', "label": True},
        {"prompt": "Q", "completion": '{"name": "f", "role": 1}', "label": True}), {},
     [("Q", '{"messages": 3}', True), ("Q", '{"name": "f", "role": 1}', True)]),
    # Tables.
    ("tables", "W&B table", "t.json", json.dumps(
        {"columns": list(UP), "data": [["Q", "A", True], ["Q", "B", False]]}).encode(), {},
     [("Q", "A", True), ("Q", "B", False)]),
    ("tables", "pandas", "t.json", json.dumps({name: {"0": value} for name, value in UP.items()}).encode(), {},
     "Write them with orient='records'"),
    ("tables", "an answer of an API", "t.json", json.dumps({"data": [UP], "total": 1}).encode(), {},
     [("Q", "A", True)]),
    ("tables", "a report with a title", "t.csv", cells("Feedback of May", "prompt,completion,label", "Q,A,up"), {},
     2 * ["the first line must name the columns"]),
    ("tables", "Excel's own encoding", "t.csv", cells("prompt,completion,label", "Où?,A,up", encoding="cp1252"),
     {"label_map": {"up": True}}, ["save the file as UTF-8, in Excel as 'CSV UTF-8'"]),
    ("tables", "PowerShell", "t.jsonl", rows(UP).decode().encode("utf-16"), {}, "is UTF-16.*Save the file as UTF-8"),
    # Something twice, of which one would be dropped.
    ("twice", "keys of JSON", "t.jsonl", b'{"prompt": "Q", "completion": "A", "completion": "B", "label": true}\n', {},
     ["the key 'completion' is there twice"]),
    ("twice", "a table's columns", "t.json", b'{"columns": ["prompt", "completion", "completion"], "data": []}', {},
     "the column 'completion' twice"),
    ("twice", "Parquet", "t.parquet", "parquet", {}, "the column 'completion' twice"),
    # Answers to one question, side by side in a list.
    ("branches", "chat-ui", "b.jsonl", rows(chat_ui()), {"format": "demonstrations"},
     [([Q], "A", True), ([Q], "B", True)]),
    ("branches", "parents", "b.jsonl", rows({"messages": [
        S | {"id": "0"}, Q | {"id": "1"}, A | {"id": "2", "parent_id": "1"}, B | {"id": "3", "parent_id": "1"}]}),
     {"format": "demonstrations"}, [([S, Q], "A", True), ([S, Q], "B", True)]),
    ("branches", "a parent that is missing", "b.jsonl", rows({"messages": [
        Q | {"id": "1"}, A | {"id": "2", "parentId": "1"}, B | {"id": "3", "parentId": "9"}], "label": True}), {},
     ["the conversation has no message '9'"]),
    # Words for roles.
    ("roles", "OpenAI's functions", "r.jsonl", rows(
        {"messages": [Q, {"role": "function", "name": "f", "content": "3"}, A], "label": True}), {},
     ["data.roles={'function': 'tool'} maps it"]),
    ("roles", "capitals", "r.jsonl", rows({"messages": [Q, A | {"role": "Assistant", "feedback": True}]}), {},
     ["data.roles={'Assistant': 'assistant'} maps it"]),
    ("roles", "a shop", "r.jsonl", rows({"messages": [Q | {"role": "customer"}, A], "label": True}), {},
     ["data.roles={'customer': 'user'} maps it"]),
]  # fmt: skip
NAMES = [f"{kind}: {tool}" for kind, tool, *_ in FILES]


def write(path, content):
    """Writes a file; parquet stands for a table that names a column twice."""
    if content == "parquet":
        columns = [pyarrow.array([text]) for text in "QAB"]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["prompt", "completion", "completion"]), path)
    else:
        path.write_bytes(content)


def said(record):
    """What is trained on: prompt and completions, of one with its label; of any other record, its reason."""
    if isinstance(record, Preference):
        return record.chosen.prompt, record.chosen.completion, record.rejected.completion
    if isinstance(record, Feedback):
        completion = record.completion
        if "tool_calls" in completion and isinstance(completion, dict):
            completion = {**completion, "tool_calls": json.loads(completion["tool_calls"])}
        return record.prompt, completion, record.desirable
    return record.reason


@pytest.mark.parametrize(("_", "tool", "name", "content", "settings", "expected"), FILES, ids=NAMES)
def test_a_file_is_read_right_or_refused_by_what_is_wrong(tmp_path, _, tool, name, content, settings, expected):
    write(tmp_path / name, content)
    if isinstance(expected, str):
        with pytest.raises(ConfigError) as error:
            list(read_records(str(tmp_path / name), DataConfig(**settings)))
        assert expected in str(error.value) or re.search(expected, str(error.value))
        return
    found = list(read_records(str(tmp_path / name), DataConfig(**settings)))
    assert len(found) == len(expected)
    for record, wanted in zip(found, expected, strict=True):
        assert wanted in said(record) if isinstance(wanted, str) else said(record) == wanted


def test_there_are_three_files_of_every_kind():
    kinds = [kind for kind, *_ in FILES]
    assert min(map(kinds.count, kinds)) >= 3 and len(set(NAMES)) == len(NAMES)


def test_columns_of_a_pair_that_thumbs_do_not_read_are_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(rows({"messages": [Q, A], "label": True, "rejected_response": "B"}))
    list(read_records(str(tmp_path / "a.jsonl"), DataConfig()))
    assert "the columns 'rejected_response' look like content and are not read" in capsys.readouterr().err
