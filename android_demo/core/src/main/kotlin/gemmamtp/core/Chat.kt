package gemmamtp.core

import com.google.gson.JsonObject

/** A message of a chat; [role] is `system`, `user` or `assistant`. */
class Message(val role: String, val content: String)

/** The text before and after a message's content. */
class Turn(val before: String, val after: String)

/**
 * The plain form that the exporter derived from a chat template. FORMAT.md, "Chat", has the rule.
 *
 * @property begin the text before the first message.
 * @property turns the text around a message, by role.
 * @property answer the text after the last message, which makes the model answer.
 * @property trim whether white space around contents is dropped.
 * @property alternate whether user and assistant must take turns, and the user's message be the last.
 * @property hidden the texts that begin and end parts of an assistant's messages that are dropped; null if none are.
 */
class ChatFormat(
    val begin: String,
    val turns: Map<String, Turn>,
    val answer: String,
    val trim: Boolean,
    val alternate: Boolean,
    val hidden: Pair<String, String>?,
)

/** Read the manifest's `chat`; throws IllegalArgumentException or IllegalStateException if it is malformed. */
fun chatFormat(json: JsonObject): ChatFormat {
    val turns = json.required("turns").asJsonObject
    for (role in listOf("user", "assistant")) require(turns.has(role)) { "chat.turns has no $role" }
    return ChatFormat(
        json.required("begin").asString,
        turns.keySet().associateWith { role -> pair(turns, role).let { Turn(it.first, it.second) } },
        json.required("answer").asString,
        json.required("trim").asBoolean,
        json.required("alternate").asBoolean,
        if (json.required("hidden").isJsonNull) null else pair(json, "hidden"),
    )
}

/** Turns messages into one prompt, the same as the checkpoint's own template. */
class ChatTemplate(private val format: ChatFormat) {
    /**
     * The prompt that asks for an answer to the last message.
     *
     * It begins with the beginning-of-text token if the template writes one. Special tokens that are spelled out in a
     * message count as special tokens, as in transformers.
     *
     * @throws InputError the format does not allow the messages.
     */
    fun render(messages: List<Message>): String {
        check(messages)
        val turns = messages.joinToString("") { message ->
            val turn = format.turns.getValue(message.role)
            turn.before + content(message) + turn.after
        }
        return format.begin + turns + format.answer
    }

    private fun check(messages: List<Message>) {
        if (messages.isEmpty()) refuse("there are none")
        for ((i, message) in messages.withIndex()) {
            if (message.role !in format.turns) refuse("it knows no role \"${message.role}\"")
            if (message.role == "system" && i > 0) refuse("a system message must be the first")
        }
        val roles = messages.map { it.role }.filter { it != "system" }
        val takeTurns = roles.withIndex().all { (i, role) -> role == if (i % 2 == 0) "user" else "assistant" }
        if (format.alternate && !(takeTurns && roles.size % 2 == 1)) {
            refuse("user and assistant must take turns, and the user begin and end")
        }
    }

    private fun content(message: Message): String {
        var text = message.content
        if (format.hidden != null && message.role == "assistant") {
            val (begin, end) = format.hidden
            text = text.split(end).joinToString("") { it.substringBefore(begin) }
        }
        return if (format.trim) text.trim(::isBlank) else text
    }

    private fun refuse(reason: String): Nothing =
        throw InputError("the chat template refuses the messages: $reason; change them")
}

/** Whether Python's str.strip() drops a character, which differs from Kotlin's trim() and Unicode's White_Space. */
internal fun isBlank(char: Char): Boolean =
    char in '\t'..'\r' || char in '\u001C'..' ' || char in '\u2000'..'\u200A' || char in OTHER_BLANKS

private const val OTHER_BLANKS = "\u0085\u00A0\u1680\u2028\u2029\u202F\u205F\u3000"

private fun pair(json: JsonObject, name: String): Pair<String, String> {
    val parts = json.required(name).asJsonArray
    require(parts.size() == 2) { "chat: $name has ${parts.size()} parts, expected two" }
    return parts[0].asString to parts[1].asString
}

private fun JsonObject.required(name: String) = requireNotNull(get(name)) { "chat.$name is missing" }
