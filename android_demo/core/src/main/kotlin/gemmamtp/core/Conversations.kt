package gemmamtp.core

import com.google.gson.JsonObject

private const val SYSTEM = "system"
private const val USER = "user"
private const val ASSISTANT = "assistant"
internal const val TOOL = "tool"
private const val BEGIN = "begin"
private const val ASK = "ask"
private const val CALL = "call"
private const val NAME = "name"
private const val BESIDE = "beside"
private const val BEFORE = "before"
private const val AFTER = "after"

/**
 * The plain form that the exporter derived for conversations with thoughts and calls. FORMAT.md, "Conversations", has the
 * rule.
 *
 * @property tools whether the prompt offers the manifest's tools.
 * @property thinking for which choices of thinking it holds; null is the template's own.
 * @property between by the kind of a body, or `begin`, and the kind of the next one, or `ask`, the text between them.
 * @property trim kinds of bodies around which white space is dropped.
 * @property hidden the texts that begin and end parts of an assistant's content that are dropped; null if none are.
 * @property thoughts kinds of bodies before which a thought is repeated, after the user's last message.
 * @property names whether the tool's name comes ahead of its answer.
 * @property beside where the content of a message with calls goes: `before` them or `after` their answers; empty if such a
 *     message has no content.
 * @property blanks whether content beside calls of which nothing is left counts as none; otherwise it has no place.
 */
internal class ConversationForm(
    val tools: Boolean,
    val thinking: Set<Boolean?>,
    val between: Map<String, Map<String, String>>,
    val trim: Set<String>,
    val hidden: Pair<String, String>?,
    val thoughts: Set<String>,
    val names: Boolean,
    val beside: String,
    val blanks: Boolean,
)

/** Read one of the manifest's `conversations`, whose form was checked. */
internal fun conversationForm(json: JsonObject) = ConversationForm(
    json.get("tools").asBoolean,
    json.getAsJsonArray("thinking").map { if (it.isJsonNull) null else it.asBoolean }.toSet(),
    json.getAsJsonObject("between").asMap().mapValues { (_, next) -> next.asJsonObject.asMap().mapValues { it.value.asString } },
    json.getAsJsonArray("trim").map { it.asString }.toSet(),
    if (json.get("hidden").isJsonNull) null else pair(json, "hidden"),
    json.getAsJsonArray("thoughts").map { it.asString }.toSet(),
    json.get("names").asBoolean,
    json.get("beside").asString,
    json.get("blanks").asBoolean,
)

/** The prompt that asks for an answer to the last message; throws InputError where there is no place for a message. */
internal fun ConversationForm.render(messages: List<Message>): String {
    val prompt = StringBuilder()
    var previous = BEGIN
    for ((kind, body) in bodies(messages) + (ASK to "")) {
        val text = between[previous]?.get(kind) ?: refuse("${SAID[kind]} cannot come after ${SAID[previous]}")
        prompt.append(text).append(body)
        previous = kind
    }
    return prompt.toString()
}

private val SAID = mapOf(
    BEGIN to "the beginning", ASK to "a request for an answer", SYSTEM to "a system message", USER to "a user's message",
    ANSWER to "an answer", THOUGHT to "a thought", CALL to "a call", NAME to "a tool's answer", TOOL to "a tool's answer",
    BESIDE to "what is said beside calls",
)

/** The bodies of a conversation in the order of its prompt, each with its kind. */
private fun ConversationForm.bodies(messages: List<Message>): List<Pair<String, String>> = buildList {
    val asked = messages.indexOfLast { it.role == USER }
    var kept = "" // content that comes after the answers to its message's calls
    var unanswered = 0
    for ((i, message) in messages.withIndex()) {
        if (message.role !in listOf(SYSTEM, USER, ASSISTANT, TOOL)) refuse("it knows no role \"${message.role}\"")
        if (message.role == TOOL && unanswered == 0) refuse("a tool answers, and no call is left to answer")
        if (message.role != TOOL && unanswered > 0) refuse("calls without an answer: $unanswered")
        if (message.role == TOOL) {
            unanswered--
            if (names && message.name.isEmpty()) refuse("a tool's answer has no name; make it with toolMessage")
            if (names) add(NAME to message.name)
            add(TOOL to trimmed(TOOL, message.content))
            continue
        }
        if (kept.isNotEmpty()) add(BESIDE to kept)
        kept = ""
        if (message.role != ASSISTANT) {
            add(message.role to trimmed(message.role, message.content))
            continue
        }
        val body = trimmed(ANSWER, shownContent(message.content, hidden))
        val first = if (message.calls.isEmpty()) ANSWER else if (body.isNotEmpty() && beside == BEFORE) BESIDE else CALL
        val allowed = message.content.isEmpty() || (beside.isNotEmpty() && (body.isNotEmpty() || blanks))
        if (message.calls.isNotEmpty() && !allowed) refuse("there is no place for content beside calls; repeat it without")
        unanswered = message.calls.size
        if (message.thought.isNotEmpty() && i > asked && first in thoughts) add(THOUGHT to trimmed(THOUGHT, message.thought))
        if (first != CALL) add(first to body)
        for (call in message.calls) add(CALL to call.text)
        if (first == CALL && beside == AFTER) kept = body
    }
    if (unanswered > 0) refuse("calls without an answer: $unanswered")
    if (kept.isNotEmpty()) add(BESIDE to kept)
}

private fun ConversationForm.trimmed(kind: String, text: String) = if (kind in trim) text.trim(::isBlank) else text
