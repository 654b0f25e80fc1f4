@file:JvmName("Messages")

package gemmamtp.core

import com.google.gson.JsonObject

/**
 * A message of a conversation.
 *
 * @property role `system`, `user`, `assistant` or `tool`.
 * @property content its text: what a tool answered, for `tool`.
 * @property calls of tools, of an assistant's message; a message of a `tool` follows for each.
 * @property thought what the assistant thought before.
 * @property name of the tool, for `tool`.
 */
public class Message @JvmOverloads constructor(
    public val role: String,
    public val content: String,
    public val calls: List<ToolCall> = emptyList(),
    public val thought: String = "",
    public val name: String = "",
)

/** What a tool answered to a call. */
public fun toolMessage(call: ToolCall, content: String): Message = Message(TOOL, content, name = call.name)

/** The text before and after a message's content. */
internal class Turn(val before: String, val after: String)

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
internal class ChatFormat(
    val begin: String,
    val turns: Map<String, Turn>,
    val answer: String,
    val trim: Boolean,
    val alternate: Boolean,
    val hidden: Pair<String, String>?,
)

/** Read the manifest's `chat`; throws IllegalArgumentException or IllegalStateException if it is malformed. */
internal fun chatFormat(json: JsonObject): ChatFormat {
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

/**
 * Turns messages into one prompt, the same as the checkpoint's own template.
 *
 * @param format for messages alone; null if there is none.
 * @param conversations for calls, thoughts and what tools answered as well.
 */
public class ChatTemplate internal constructor(
    private val format: ChatFormat?,
    private val conversations: List<ConversationForm> = emptyList(),
) {
    /**
     * The prompt that asks for an answer to the last message.
     *
     * It begins with the beginning-of-text token if the template writes one. Special tokens that are spelled out in a
     * message count as special tokens, as in transformers.
     *
     * @param tools whether to offer the manifest's tools.
     * @param thinking whether the model thinks before it answers; null leaves it to the template.
     * @throws InputError there is no form of such prompts, or it does not allow the messages.
     */
    public fun render(messages: List<Message>, tools: Boolean = false, thinking: Boolean? = null): String {
        if (messages.isEmpty()) refuse("there are none")
        val form = conversations.firstOrNull { it.tools == tools && thinking in it.thinking }
        if (form != null) {
            try {
                return form.render(messages)
            } catch (error: InputError) { // `format` may have a place for them
                val plain = messages.all { it.calls.isEmpty() && it.thought.isEmpty() && it.role != TOOL }
                if (tools || thinking != null || format == null || !plain) throw error
            }
        }
        if (tools && conversations.none { it.tools }) {
            throw InputError("the bundle has no form of prompts with tools; export it with --tools, or offer none")
        }
        if (tools || thinking != null) {
            throw InputError("the bundle has no form of prompts with thinking ${thinking ?: "unsaid"}; choose another")
        }
        if (format == null) throw InputError("the bundle has no form of chats; continue texts instead")
        return format.render(messages)
    }

    /** Whether there is a form of such prompts. */
    public fun has(tools: Boolean = false, thinking: Boolean? = null): Boolean =
        conversations.any { it.tools == tools && thinking in it.thinking } || (format != null && !tools && thinking == null)
}

/** What turns messages into prompts of a bundle; null if it has no form of them. */
internal fun chatTemplate(manifest: Manifest): ChatTemplate? =
    if (manifest.chat == null && manifest.conversations.isEmpty()) null
    else ChatTemplate(manifest.chat, manifest.conversations)

private fun ChatFormat.render(messages: List<Message>): String {
    check(messages)
    val texts = messages.joinToString("") { message ->
        val turn = turns.getValue(message.role)
        turn.before + content(message) + turn.after
    }
    return begin + texts + answer
}

private fun ChatFormat.check(messages: List<Message>) {
    for ((i, message) in messages.withIndex()) {
        if (message.role !in turns) refuse("it knows no role \"${message.role}\"")
        if (message.role == "system" && i > 0) refuse("a system message must be the first")
        if (message.calls.isNotEmpty()) refuse("it knows no calls of tools")
        if (message.thought.isNotEmpty()) refuse("it knows no thoughts, repeat it without")
    }
    val roles = messages.map { it.role }.filter { it != "system" }
    val takeTurns = roles.withIndex().all { (i, role) -> role == if (i % 2 == 0) "user" else "assistant" }
    if (alternate && !(takeTurns && roles.size % 2 == 1)) {
        refuse("user and assistant must take turns, and the user begin and end")
    }
}

private fun ChatFormat.content(message: Message): String {
    val text = if (message.role == "assistant") shownContent(message.content, hidden) else message.content
    return if (trim) text.trim(::isBlank) else text
}

/** What an assistant's content repeats to the model: all but the text between two markers. */
internal fun shownContent(content: String, hidden: Pair<String, String>?): String {
    val (begin, end) = hidden ?: return content
    return content.split(end).joinToString("") { it.substringBefore(begin) }
}

internal fun refuse(reason: String): Nothing =
    throw InputError("the chat template refuses the messages: $reason; change them")

/** Whether Python's str.strip() drops a character, which differs from Kotlin's trim() and Unicode's White_Space. */
internal fun isBlank(char: Char): Boolean =
    char in '\t'..'\r' || char in '\u001C'..' ' || char in '\u2000'..'\u200A' || char in OTHER_BLANKS

private const val OTHER_BLANKS = "\u0085\u00A0\u1680\u2028\u2029\u202F\u205F\u3000"

internal fun pair(json: JsonObject, name: String): Pair<String, String> {
    val parts = json.required(name).asJsonArray
    require(parts.size() == 2) { "chat: $name has ${parts.size()} parts, expected two" }
    return parts[0].asString to parts[1].asString
}

private fun JsonObject.required(name: String) = requireNotNull(get(name)) { "chat.$name is missing" }
