package gemmamtp.core

import java.io.File
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException

internal const val TOKENIZER = "tokenizer.json"

/**
 * Converts text to tokens and back with the bundle's tokenizer.json, with the results of the `tokenizers` library.
 *
 * @param bos id of the beginning-of-text token, which Gemma expects before every prompt.
 * @param eos ids of the tokens that end a text or a turn.
 * @param channels ids of the tokens that begin and end each channel, whose tokens are no part of an answer, by its name.
 * @param forms what each channel has around its content, by its name.
 */
public class Tokenizer internal constructor(
    file: File,
    private val bos: Int,
    private val eos: Set<Int> = emptySet(),
    private val channels: Map<String, Pair<Int, Int>> = emptyMap(),
    private val forms: Map<String, PartForm> = emptyMap(),
) {
    private val parts: TokenizerParts
    private val raw: AddedTokens
    private val normalized: AddedTokens

    /** @throws InputError the bundle has no tokenizer, or one that cannot be read. */
    internal constructor(bundle: File, manifest: Manifest) :
        this(File(bundle, TOKENIZER), manifest.bos, manifest.eos, manifest.channels, manifest.parts)

    init {
        if (!file.exists()) throw InputError("$file: is missing; export a checkpoint that has a tokenizer")
        parts = readTokenizer(file)
        val (after, before) = parts.added.partition { it.normalized }
        raw = AddedTokens(before.associate { it.content to it.id })
        normalized = AddedTokens(after.associate { parts.normalize(it.content) to it.id })
    }

    private val added = parts.added.associateBy { it.id }
    private val special = parts.added.filter { it.special }.map { it.content }.toSet()

    /**
     * Token ids of a prompt, the first of them the beginning-of-text token, which is added if the text does not spell it.
     *
     * @throws InputError the text has unpaired surrogates, which UTF-8 cannot encode.
     */
    public fun encode(text: String): IntArray {
        if (!wellFormed(text)) {
            throw InputError("the prompt is not valid UTF-8 (surrogates not allowed); pass well-formed text")
        }
        val ids = ArrayList<Int>()
        raw.split(text, ids::add) { piece ->
            normalized.split(parts.normalize(piece), ids::add) { plain ->
                for (word in parts.split(plain)) if (word.isNotEmpty()) parts.bpe.encode(word, ids)
            }
        }
        if (ids.firstOrNull() != bos) ids.add(0, bos)
        return ids.toIntArray()
    }

    /** The text of token ids, without those that do not exist, and without special tokens unless [withSpecial] asks. */
    public fun decode(ids: List<Int>, withSpecial: Boolean = false): String {
        val all = ids.mapNotNull { added[it]?.content ?: parts.vocabulary.token(it) }
        val tokens = if (withSpecial) all else all.filter { it !in special }
        return parts.decode(tokens).joinToString("")
    }

    /**
     * Begin a text that is decoded token by token, up to any of the stop strings.
     *
     * @param prompt token ids before the text.
     */
    internal fun stream(stop: List<String> = emptyList(), prompt: List<Int> = emptyList()): TextStream =
        TextStream(::decode, stop, PartTracker(channels, eos, prompt), forms)
}

/** Finds added tokens in a text: the leftmost, and the longest of several that begin at the same place. */
private class AddedTokens(private val ids: Map<String, Int>) {
    private val lengths: Map<Char, List<Int>> = ids.keys.groupBy { it[0] }.mapValues { (_, tokens) ->
        tokens.map { it.length }.distinct().sortedDescending()
    }

    /** Calls [token] and [text] for the parts of a text, in order. */
    fun split(whole: String, token: (Int) -> Unit, text: (String) -> Unit) {
        var start = 0
        var i = 0
        while (i < whole.length) {
            val length = lengths[whole[i]]?.firstOrNull { i + it <= whole.length && whole.substring(i, i + it) in ids }
            if (length == null) {
                i++
                continue
            }
            if (start < i) text(whole.substring(start, i))
            token(ids.getValue(whole.substring(i, i + length)))
            i += length
            start = i
        }
        if (start < whole.length) text(whole.substring(start))
    }
}

/** Split a text after each pattern; of several patterns in a row, only the first stays with the text before it. */
internal fun splitAfter(text: String, pattern: String): List<String> {
    val pieces = ArrayList<String>()
    var start = 0
    while (start < text.length) {
        val at = text.indexOf(pattern, start)
        val end = if (at < 0) text.length else at + pattern.length
        pieces.add(text.substring(start, end))
        start = end
    }
    return pieces
}

/** Split a text before each pattern; of several patterns in a row, only the last stays with the text after it. */
internal fun splitBefore(text: String, pattern: String): List<String> {
    val pieces = ArrayList<String>()
    var start = 0
    while (start < text.length) {
        val at = text.indexOf(pattern, if (text.startsWith(pattern, start)) start + pattern.length else start)
        val end = if (at < 0) text.length else at
        pieces.add(text.substring(start, end))
        start = end
    }
    return pieces
}

/** Replace each run of byte tokens, `<0x00>` to `<0xFF>`, by its text in UTF-8, or by U+FFFD for each byte if it is none. */
internal fun joinBytes(tokens: List<String>): List<String> {
    val texts = ArrayList<String>()
    var i = 0
    while (i < tokens.size) {
        val run = tokens.subList(i, tokens.size).asSequence().map(::byteOf).takeWhile { it != null }.filterNotNull()
        val bytes = run.map { it.toByte() }.toList().toByteArray()
        texts.add(if (bytes.isEmpty()) tokens[i] else utf8(bytes) ?: "\uFFFD".repeat(bytes.size))
        i += maxOf(bytes.size, 1)
    }
    return texts
}

/** The byte that a token stands for, null if none; as in the library, `<0xa0>` and `<0x+1>` count as well. */
private fun byteOf(token: String): Int? {
    if (token.length != 6 || !token.startsWith("<0x") || !token.endsWith(">")) return null
    val digits = token.substring(3, 5).removePrefix("+")
    return if (digits.all { it in '0'..'9' || it in 'a'..'f' || it in 'A'..'F' }) digits.toIntOrNull(16) else null
}

private fun utf8(bytes: ByteArray): String? =
    try {
        Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString()
    } catch (error: CharacterCodingException) {
        null
    }

internal fun wellFormed(text: String): Boolean {
    var i = 0
    while (i < text.length) {
        val point = text.codePointAt(i)
        if (point in 0xD800..0xDFFF) return false
        i += Character.charCount(point)
    }
    return true
}
