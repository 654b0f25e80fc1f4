package gemmamtp.core

import java.util.PriorityQueue

/** Bits of the ids of tokens and merges in a [Merges] entry. */
internal const val ID_BITS = 21
private const val ID_MASK = (1L shl ID_BITS) - 1
private const val MAX_IDS = 1 shl ID_BITS

/** Tokens by id and by text, as UTF-8 in one array: as strings Gemma's 262144 would take a fifth of a phone's heap. */
internal class Vocabulary {
    private var text = ByteArray(1 shl 12)
    private var used = 0
    private var starts = IntArray(0) // by id, -1 where there is no token
    private var lengths = IntArray(0)
    private var table = IntArray(1 shl 9) { -1 } // open addressing, at most half full
    private var scratch = ByteArray(64)

    /** How many different texts there are. */
    var size = 0
        private set

    /** Add a token; throws IllegalArgumentException if the id is out of range or taken. */
    fun add(token: String, id: Int) {
        require(id in 0 until MAX_IDS) { "token $id is beyond the $MAX_IDS ids that fit" }
        if (id >= starts.size) {
            val known = starts.size
            starts = starts.copyOf(maxOf(id + 1, minOf(2 * known, MAX_IDS)))
            starts.fill(-1, known, starts.size)
            lengths = lengths.copyOf(starts.size)
        }
        require(starts[id] < 0) { "two tokens have id $id" }
        val bytes = token.toByteArray()
        if (used + bytes.size > text.size) text = text.copyOf(maxOf(2 * text.size, used + bytes.size))
        bytes.copyInto(text, used)
        starts[id] = used
        lengths[id] = bytes.size
        used += bytes.size
        if (2 * (size + 1) > table.size) {
            val old = table
            table = IntArray(2 * old.size) { -1 }
            for (other in old) if (other >= 0) table[slot(text, starts[other], lengths[other])] = other
        }
        val place = slot(bytes, 0, bytes.size)
        if (table[place] < 0) size++
        table[place] = id
    }

    /** The id of a token, -1 if there is none. */
    fun id(token: String): Int {
        val bytes = token.toByteArray()
        return id(bytes, bytes.size)
    }

    /** The id of a token in UTF-8, -1 if there is none. */
    fun id(bytes: ByteArray, length: Int): Int = table[slot(bytes, 0, length)]

    /** The id of the token whose text is that of two others joined, -1 if there is none. */
    fun joined(left: Int, right: Int): Int {
        val length = lengths[left] + lengths[right]
        if (length > scratch.size) scratch = ByteArray(2 * length)
        text.copyInto(scratch, 0, starts[left], starts[left] + lengths[left])
        text.copyInto(scratch, lengths[left], starts[right], starts[right] + lengths[right])
        return id(scratch, length)
    }

    /** The text of a token, null if there is none. */
    fun token(id: Int): String? =
        if (id < 0 || id >= starts.size || starts[id] < 0) null else String(text, starts[id], lengths[id], Charsets.UTF_8)

    /** Where a text is in the table, or would be. */
    private fun slot(bytes: ByteArray, from: Int, length: Int): Int {
        var hash = -0x7ee3623b // FNV-1a
        for (i in from until from + length) hash = (hash xor bytes[i].toInt()) * 0x01000193
        var place = (hash xor (hash ushr 15)) and (table.size - 1)
        while (table[place] >= 0 && !same(table[place], bytes, from, length)) place = (place + 1) and (table.size - 1)
        return place
    }

    private fun same(id: Int, bytes: ByteArray, from: Int, length: Int): Boolean {
        if (lengths[id] != length) return false
        for (i in 0 until length) if (text[starts[id] + i] != bytes[from + i]) return false
        return true
    }
}

/** Pairs of tokens that merge: left, right and rank in one number each. Call [sort] after the last [add]. */
internal class Merges(private val vocabulary: Vocabulary) {
    private var pairs = LongArray(1 shl 8)
    private var joined = IntArray(1 shl 8) // by rank
    private var count = 0

    /** Add a merge, of the next rank; throws IllegalArgumentException if one of its three tokens is not in the vocabulary. */
    fun add(left: String, right: String) {
        require(count < MAX_IDS) { "model.merges has more than the $MAX_IDS merges that fit" }
        if (count == pairs.size) {
            pairs = pairs.copyOf(2 * count)
            joined = joined.copyOf(2 * count)
        }
        val (a, b) = vocabulary.id(left) to vocabulary.id(right)
        val id = if (a < 0 || b < 0) -1 else vocabulary.joined(a, b)
        require(id >= 0) { "merge $count, \"$left\" and \"$right\": they or what they make is not in model.vocab" }
        pairs[count] = (a.toLong() shl 2 * ID_BITS) or (b.toLong() shl ID_BITS) or count.toLong()
        joined[count++] = id
    }

    fun sort() {
        pairs = pairs.copyOf(count)
        joined = joined.copyOf(count)
        pairs.sort()
    }

    /** The rank of a pair, -1 if it does not merge; of a pair that is listed twice, the later one. */
    fun rank(left: Int, right: Int): Int {
        val pair = (left.toLong() shl ID_BITS) or right.toLong()
        var (low, high) = 0 to count // the first entry beyond the pair lies in low..high
        while (low < high) {
            val middle = (low + high) ushr 1
            if ((pairs[middle] ushr ID_BITS) <= pair) low = middle + 1 else high = middle
        }
        return if (low > 0 && (pairs[low - 1] ushr ID_BITS) == pair) (pairs[low - 1] and ID_MASK).toInt() else -1
    }

    /** The token that the merge of a rank gives. */
    fun joined(rank: Int): Int = joined[rank]
}

/** Byte pair encoding with the results of the `tokenizers` library. */
internal class Bpe(
    private val vocabulary: Vocabulary,
    private val merges: Merges,
    private val unk: Int?,
    private val fuseUnk: Boolean,
    byteFallback: Boolean,
    private val ignoreMerges: Boolean,
) {
    /** The token of each byte, -1 where there is none; null if unknown characters are not encoded as bytes. */
    private val bytes = if (byteFallback) IntArray(256) { vocabulary.id(byteToken(it)) } else null

    /** Add the tokens of a word, well-formed text, to [ids]; takes n log n steps. */
    fun encode(word: String, ids: MutableList<Int>) {
        if (ignoreMerges) {
            val whole = vocabulary.id(word)
            if (whole >= 0) {
                ids.add(whole)
                return
            }
        }
        val symbols = symbols(word)
        merge(symbols)
        for (symbol in symbols) if (symbol >= 0) ids.add(symbol)
    }

    /** The tokens of a word's characters. */
    private fun symbols(word: String): IntArray {
        var symbols = IntArray(word.length + 4)
        var count = 0
        fun add(id: Int) {
            if (count == symbols.size) symbols = symbols.copyOf(2 * count)
            symbols[count++] = id
        }
        var unknown = false // an unk token is still to be added
        val utf8 = ByteArray(4)
        var i = 0
        while (i < word.length) {
            val point = word.codePointAt(i)
            i += Character.charCount(point)
            val length = utf8(point, utf8)
            val id = vocabulary.id(utf8, length)
            if (id >= 0) {
                if (unknown) add(unk!!)
                unknown = false
                add(id)
            } else if (bytes != null && (0 until length).all { bytes[utf8[it].toInt() and 0xFF] >= 0 }) {
                // As in the library, an unk token that is still to be added comes after the bytes.
                for (k in 0 until length) add(bytes[utf8[k].toInt() and 0xFF])
            } else if (unk != null) {
                if (unknown && !fuseUnk) add(unk)
                unknown = true
            }
        }
        if (unknown) add(unk!!)
        return symbols.copyOf(count)
    }

    /** Merge pairs in place, lowest rank first, of equal ranks the left one; -1 marks a token that was merged away. */
    private fun merge(symbols: IntArray) {
        val next = IntArray(symbols.size) { if (it + 1 < symbols.size) it + 1 else -1 }
        val previous = IntArray(symbols.size) { it - 1 }
        val queue = PriorityQueue<Long>() // rank, then position of the left token
        fun offer(left: Int) {
            val rank = if (left < 0 || next[left] < 0) -1 else merges.rank(symbols[left], symbols[next[left]])
            if (rank >= 0) queue.add((rank.toLong() shl 32) or left.toLong())
        }
        for (i in symbols.indices) offer(i)
        while (true) {
            val best = queue.poll() ?: break
            val left = (best and 0xFFFFFFFFL).toInt()
            val right = next[left]
            if (symbols[left] < 0 || right < 0) continue
            // One of the two may have been merged since. As in the library, it counts only that they give the same token.
            val joined = merges.joined((best ushr 32).toInt())
            val rank = merges.rank(symbols[left], symbols[right])
            if (rank < 0 || merges.joined(rank) != joined) continue
            symbols[left] = joined
            symbols[right] = -1
            next[left] = next[right]
            if (next[left] >= 0) previous[next[left]] = left
            offer(previous[left])
            offer(left)
        }
    }
}

private fun byteToken(byte: Int): String = "<0x" + byte.toString(16).uppercase().padStart(2, '0') + ">"

/** Write a code point as UTF-8, and return how many bytes it has. */
private fun utf8(point: Int, into: ByteArray): Int {
    val length = if (point < 0x80) 1 else if (point < 0x800) 2 else if (point < 0x10000) 3 else 4
    for (i in length - 1 downTo 1) into[i] = (0x80 or ((point ushr 6 * (length - 1 - i)) and 0x3F)).toByte()
    val lead = intArrayOf(0, 0xC0, 0xE0, 0xF0)[length - 1]
    into[0] = (lead or (point ushr 6 * (length - 1))).toByte()
    return length
}
