package gemmamtp.core

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonNull
import com.google.gson.JsonObject
import com.google.gson.JsonPrimitive

private const val MAX_DEPTH = 64 // of a value inside others, so that no text exhausts the stack
private val JSON_ARGUMENTS = listOf("arguments", "parameters")
private val NUMBER = Regex("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][-+]?[0-9]+)?")

/**
 * A call of a tool, as the model wrote it.
 *
 * @property id stands for the call in the conversation: the answer to it names it.
 * @property name of the tool; empty if the call could not be read.
 * @property arguments a JSON object as text.
 * @property text the call as it was written, special tokens spelled out.
 * @property problem why it could not be read; empty if it could.
 */
public class ToolCall(
    public val id: String,
    public val name: String,
    public val arguments: String,
    public val text: String,
    public val problem: String = "",
)

/**
 * Read a call; one that is malformed is returned with its problem. FORMAT.md, "Calls of tools", specifies the syntaxes.
 *
 * @param text what stands between the marks of a call.
 * @param form how calls are written.
 * @param id the call's.
 * @param closed whether the mark that ends the call came.
 */
internal fun readCall(text: String, form: PartForm, id: String = "", closed: Boolean = true): ToolCall =
    try {
        val read = requireNotNull(SYNTAXES[form.syntax]) { "the bundle does not say how calls are written" }
        require(closed) { "the call has no end" }
        val (before, after, inner) = listOf(form.before, form.after, text).map { it.trim(::isBlank) }
        require(inner.startsWith(before) && inner.endsWith(after) && inner.length >= before.length + after.length) {
            "expected '$before' at its beginning and '$after' at its end"
        }
        val (name, arguments) = read(inner.substring(before.length, inner.length - after.length), form.quote)
        // Half a character cannot go into the next prompt.
        require(wellFormed("$arguments") && wellFormed(name)) { "a text in it is not valid UTF-8" }
        ToolCall(id, name, arguments.toString(), text)
    } catch (error: IllegalArgumentException) {
        ToolCall(id, "", "{}", text, error.message.orEmpty())
    }

private val SYNTAXES: Map<String, (String, String) -> Pair<String, JsonObject>> =
    mapOf("pairs" to ::readPairs, "json" to { text, _ -> readJson(text) })

/** Reads `NAME{KEY:VALUE,...}`, in which objects and lists are written as in JSON and keys bare. */
private fun readPairs(text: String, quote: String): Pair<String, JsonObject> {
    val reader = ValueReader(text, quote)
    val name = reader.until("{").trim(::isBlank)
    require(name.isNotEmpty()) { "the call names no tool" }
    val arguments = reader.members(0)
    reader.expectEnd()
    return name to arguments
}

/** Reads a JSON object with a `name` and `arguments`, or a list of one such object. */
private fun readJson(text: String): Pair<String, JsonObject> {
    val reader = ValueReader(text, "", bareKeys = false)
    var call = reader.value(0)
    reader.expectEnd()
    if (call is JsonArray && call.size() == 1) call = call[0]
    val name = (call as? JsonObject)?.get("name") as? JsonPrimitive
    require(call is JsonObject && name != null && name.isString) { "expected an object with a name and arguments" }
    val arguments = JSON_ARGUMENTS.firstNotNullOfOrNull(call::get) ?: JsonObject()
    require(arguments is JsonObject) { "arguments are ${"$arguments".take(40)}, expected an object" }
    return name.asString to arguments
}

/** Reads values from a text, from left to right. */
private class ValueReader(private val text: String, private val quote: String, private val bareKeys: Boolean = true) {
    private var at = 0

    /** The text up to the next [end], which is passed over. */
    fun until(end: String): String {
        val found = text.indexOf(end, at)
        require(found >= 0) { "expected '$end' after '${rest()}'" }
        return text.substring(at, found).also { at = found + end.length }
    }

    /** The members of an object whose opening brace was read. */
    fun members(depth: Int): JsonObject {
        val members = JsonObject()
        items("}", depth) {
            val key = key()
            members.add(key, value(depth))
        }
        return members
    }

    fun value(depth: Int): JsonElement {
        if (quote.isNotEmpty() && passes(quote)) return JsonPrimitive(until(quote))
        if (passes("{")) return members(depth + 1)
        if (passes("[")) return JsonArray().also { list -> items("]", depth + 1) { list.add(value(depth + 1)) } }
        if (passes("null") || (bareKeys && passes("None"))) return JsonNull.INSTANCE
        if (passes("true")) return JsonPrimitive(true)
        if (passes("false")) return JsonPrimitive(false)
        if (passes("\"")) return JsonPrimitive(string())
        val number = requireNotNull(NUMBER.matchAt(text, at)) { "expected a value at '${rest()}'" }.value
        at += number.length
        require(number.length <= MAX_DIGITS) { "a number has ${number.length} digits" }
        if (number.none { it in ".eE" }) return JsonPrimitive(number.toBigInteger())
        return JsonPrimitive(number.toDouble().also { require(it.isFinite()) { "${number.take(20)} is too large" } })
    }

    fun expectEnd() = require(text.substring(at).all(::isBlank)) { "'${rest()}' follows the call" }

    /** Calls [read] before each item of an object or a list, up to its end. */
    private fun items(end: String, depth: Int, read: () -> Unit) {
        require(depth <= MAX_DEPTH) { "values are nested too deeply" }
        if (passes(end)) return
        while (true) {
            read()
            if (passes(end)) return
            require(passes(",")) { "expected ',' or '$end' at '${rest()}'" }
        }
    }

    private fun key(): String {
        if (bareKeys && !(quote.isNotEmpty() && passes(quote))) return until(":").trim(::isBlank)
        require(bareKeys || passes("\"")) { "expected a key at '${rest()}'" }
        val key = if (bareKeys) until(quote) else string()
        require(passes(":")) { "expected ':' at '${rest()}'" }
        return key
    }

    /** A JSON string whose opening quotation mark was read. */
    private fun string(): String {
        val read = StringBuilder()
        while (true) {
            require(at < text.length) { "a text has no end" }
            val char = text[at++]
            if (char == '"') return read.toString()
            read.append(if (char == '\\') escaped() else char)
        }
    }

    private fun escaped(): Char {
        require(at < text.length) { "a text has no end" }
        val char = text[at++]
        if (char != 'u') return requireNotNull(ESCAPES[char]) { "'\\$char' is no escape of JSON" }
        val digits = text.substring(at, minOf(at + 4, text.length))
        require(digits.length == 4 && digits.all { it in HEXADECIMAL }) { "'\\u$digits' is no escape of JSON" }
        at += 4
        return digits.toInt(16).toChar()
    }

    /** Passes over whitespace, and over a sign if it follows. */
    private fun passes(sign: String): Boolean {
        while (at < text.length && isBlank(text[at])) at++
        return text.startsWith(sign, at).also { if (it) at += sign.length }
    }

    private fun rest() = text.substring(at).take(40)
}

private const val MAX_DIGITS = 4300 // as many as Python converts
private const val HEXADECIMAL = "0123456789abcdefABCDEF"
private val ESCAPES = mapOf(
    '"' to '"', '\\' to '\\', '/' to '/', 'b' to '\b', 'f' to '\u000C', 'n' to '\n', 'r' to '\r', 't' to '\t',
)
