package gemmamtp.core

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

private const val SESSION_FORMAT = "gemma-mtp-session"
private const val SESSION_VERSION = 1
private const val METADATA = "__metadata__"
private const val TOKENS = "tokens"
private const val REMEDY = "run the prompt again and save it"
private val DTYPES = mapOf(KVType.FLOAT32 to "F32", KVType.FLOAT16 to "F16")
private const val TOKEN_DTYPE = "I32"

/** The data begin at a multiple of it, so that pages of the file are pages in memory. */
private const val DATA_ALIGNMENT = 4096

/** No header is longer, so that nothing is allocated for a length that is no length. */
private const val MAX_HEADER = 16L shl 20

private val WHOLE = Regex("0|[1-9][0-9]{0,8}")

/** A tensor of the file: its data are its bytes from [begin] to [end], counted from where all data begin. */
private class Stored(val dtype: String, val shape: List<Long>, val begin: Long, val end: Long)

/**
 * Write a conversation to a session file, whose form FORMAT.md has, whole or not at all.
 *
 * @throws InputError it cannot be written; a file that was there is as it was.
 */
internal fun writeSession(file: File, manifest: Manifest, cache: Cache, planner: DraftLength) {
    val header = sessionHeader(manifest, cache, planner)
    // The numbers of buffers are in native order, which is this one on every Android.
    val tokens = ByteBuffer.allocate(cache.position * Int.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN)
    cache.tokens.forEachIndexed { i, token -> tokens.putInt(i * Int.SIZE_BYTES, token) }
    try {
        writeWhole(file) { stream ->
            val write = { bytes: ByteBuffer -> while (bytes.hasRemaining()) stream.channel.write(bytes) }
            write(ByteBuffer.wrap(header))
            for (kv in ordered(manifest)) cache.write(kv, write)
            write(tokens)
        }
    } catch (error: IOException) {
        throw InputError("$file: cannot be written (${oneLine(error)}); free some space, or save to another folder", error)
    }
}

/** Everything before the data. */
private fun sessionHeader(manifest: Manifest, cache: Cache, planner: DraftLength): ByteArray {
    val header = JsonObject()
    header.add(
        METADATA,
        JsonObject().apply {
            addProperty("format", SESSION_FORMAT)
            addProperty("version", "$SESSION_VERSION")
            addProperty("bundle", manifest.digest)
            addProperty("max_seq_len", "${manifest.maxSeqLen}")
            addProperty("window_start", "${cache.windowStart}")
            addProperty("planner", planner.toJson().toString())
        },
    )
    for ((name, tensor) in tensors(manifest, cache.position, cache.windowStart)) {
        val entry = JsonObject().apply { addProperty("dtype", tensor.dtype) }
        entry.add("shape", JsonArray().apply { tensor.shape.forEach { add(it) } })
        entry.add("data_offsets", JsonArray().apply { listOf(tensor.begin, tensor.end).forEach { add(it) } })
        header.add(name, entry)
    }
    val text = header.toString().toByteArray()
    val padded = roundUp(Long.SIZE_BYTES + text.size, DATA_ALIGNMENT)
    val bytes = ByteArray(padded) { ' '.code.toByte() }
    ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).putLong((padded - Long.SIZE_BYTES).toLong()).put(text)
    return bytes
}

/** The manifest's buffers as they are written: larger numbers first, so that each begins at a multiple of its numbers' size. */
private fun ordered(manifest: Manifest) = manifest.kv.sortedByDescending { it.type.bytes }

/** The file's tensors by name, in order: the manifest's buffers, then the token ids. */
private fun tensors(manifest: Manifest, position: Int, windowStart: Int): Map<String, Stored> {
    val stored = LinkedHashMap<String, Stored>()
    var end = 0L
    fun add(name: String, dtype: String, shape: List<Long>, itemBytes: Int) {
        val begin = end
        end += shape.fold(itemBytes.toLong(), Long::times)
        stored[name] = Stored(dtype, shape, begin, end)
    }
    for (kv in ordered(manifest)) {
        val rows = bufferRows(manifest, kv, usedRows(kv, position, windowStart))
        add(kv.name, DTYPES.getValue(kv.type), kv.shape(rows), kv.type.bytes)
    }
    add(TOKENS, TOKEN_DTYPE, listOf(position.toLong()), Int.SIZE_BYTES)
    return stored
}

/**
 * The conversation of a session file. Its keys and values are mapped, so that they are read when they are needed, and running
 * them changes memory, never the file; another file may take the place of this one, but nothing may be written into it. Those
 * of a file that may only be read are read into memory.
 *
 * @param planner goes on from what the file's had learnt, as [DraftLength.restore].
 * @param allocate see [Cache].
 * @param mapped whether to map it, else it is read.
 * @throws InputError the file cannot be read, is no session, or not one of this bundle.
 */
internal fun readSession(
    file: File,
    manifest: Manifest,
    planner: DraftLength,
    allocate: (Long) -> ByteBuffer = ::direct,
    mapped: Boolean = file.canWrite(),
): Cache {
    if (!file.isFile) throw InputError("$file: no such file, expected a saved session; $REMEDY")
    try {
        // A private mapping must be of a file that is open for writing as well, although it never writes.
        return RandomAccessFile(file, if (mapped) "rw" else "r").use {
            SessionReader(file, it.channel, manifest, mapped, allocate).read(planner)
        }
    } catch (error: IOException) {
        throw InputError("$file: cannot be read and mapped (${oneLine(error)}), expected a saved session; $REMEDY", error)
    } catch (error: InputError) {
        throw error
    } catch (error: StackOverflowError) {
        throw InputError("$file: not a session that is whole (its header is nested too deep); $REMEDY", error)
    } catch (error: RuntimeException) { // whatever is missing, of another type, or does not fit
        val type = if (error is IllegalArgumentException) "" else "${error.javaClass.simpleName}: "
        throw InputError("$file: not a session that is whole ($type${oneLine(error)}); $REMEDY", error)
    }
}

/** Reads and checks one file; throws IllegalArgumentException for what is malformed. */
private class SessionReader(
    private val file: File,
    private val channel: FileChannel,
    private val manifest: Manifest,
    private val mapped: Boolean,
    private val allocate: (Long) -> ByteBuffer,
) {
    private val size = channel.size()

    fun read(planner: DraftLength): Cache {
        require(size >= Long.SIZE_BYTES) { "it has $size bytes, expected at least ${Long.SIZE_BYTES}" }
        val length = bytes(0, Long.SIZE_BYTES).long
        val limit = minOf(MAX_HEADER, size - Long.SIZE_BYTES)
        require(length in 0..limit) { "its header's length is $length, expected 0 to $limit" }
        val data = Long.SIZE_BYTES + length
        val header = parseJson(bytes(Long.SIZE_BYTES.toLong(), length.toInt()).array(), file, "a saved session; $REMEDY")
        require(header is JsonObject) { "its header is no object" }
        val metadata = metadata(header.get(METADATA))
        val stored = header.asMap().filterKeys { it != METADATA }.mapValues { (name, entry) -> stored(name, entry) }
        val position = position(stored[TOKENS])
        val start = windowStart(metadata.getValue("window_start"), position)
        checkTensors(stored, tensors(manifest, position, start), data)
        val tokens = tokens(data + stored.getValue(TOKENS).begin, position)
        val buffers = manifest.kv.associate { it.name to buffer(it, position, start, data + stored.getValue(it.name).begin) }
        planner.restore(JsonParser.parseString(metadata.getValue("planner")))
        return Cache(manifest, allocate).apply { restore(tokens, start, buffers) }
    }

    private fun metadata(entry: JsonElement?): Map<String, String> {
        require(entry is JsonObject) { "$METADATA is ${shown(entry)}, expected an object" }
        fun text(key: String): String {
            val value = entry.get(key)
            require(value != null && value.isJsonPrimitive && value.asJsonPrimitive.isString) {
                "$key is ${shown(value)}, expected a text"
            }
            return value.asString
        }
        require(text("format") == SESSION_FORMAT) { "format is ${shown(entry.get("format"))}, expected $SESSION_FORMAT" }
        val version = text("version")
        if (version != "$SESSION_VERSION") {
            val isNewer = WHOLE.matches(version) && version.toInt() > SESSION_VERSION
            val remedy = if (isNewer) "update the app" else REMEDY
            val found = shown(entry.get("version"))
            throw InputError("$file: version is $found, this version reads $SESSION_VERSION; $remedy")
        }
        if (text("bundle") != manifest.digest) {
            throw InputError(
                "$file: was saved with another bundle, whose manifest's sha256 is ${entry.get("bundle").toString().take(66)}," +
                    " expected ${manifest.digest}; run the prompt again, or open that bundle",
            )
        }
        return listOf("window_start", "planner").associateWith(::text)
    }

    private fun stored(name: String, entry: JsonElement): Stored {
        require(entry is JsonObject) { "$name is ${shown(entry)}, expected an object" }
        val dtype = entry.get("dtype")
        require(dtype != null && dtype.isJsonPrimitive) { "dtype of $name is ${shown(dtype)}, expected a text" }
        val (begin, end) = numbers(entry, "data_offsets", name).also {
            require(it.size == 2 && it[0] <= it[1]) { "data_offsets of $name are $it, expected a beginning and an end" }
        }
        return Stored(dtype.asString, numbers(entry, "shape", name), begin, end)
    }

    private fun numbers(entry: JsonObject, key: String, name: String): List<Long> {
        val list = entry.get(key)
        require(list is JsonArray) { "$key of $name is ${shown(list)}, expected a list" }
        return list.map { item ->
            val number = item.takeIf { it.isJsonPrimitive && it.asJsonPrimitive.isNumber }?.asString?.toLongOrNull()
            require(number != null && number >= 0) { "$key of $name has ${shown(item)}, expected whole numbers" }
            number
        }
    }

    /** How many tokens the file has. */
    private fun position(tokens: Stored?): Int {
        require(tokens != null) { "$TOKENS are missing" }
        require(tokens.shape.size == 1 && tokens.shape[0] <= manifest.maxSeqLen) {
            "the shape of $TOKENS is ${tokens.shape}, expected at most ${manifest.maxSeqLen} in one dimension"
        }
        return tokens.shape[0].toInt()
    }

    private fun windowStart(text: String, position: Int): Int {
        val latest = windowStartAt(manifest, position)
        val earliest = maxOf(0, position - manifest.limits.getValue("window_rows"))
        val start = if (WHOLE.matches(text)) text.toInt() else -1
        require(start in earliest..latest && start % SLIDE_ROWS == 0) {
            "window_start is ${text.take(20)}, expected a multiple of $SLIDE_ROWS from $earliest to $latest"
        }
        return start
    }

    /** Check that the tensors are those of the manifest, and that their data are all that follows, without holes. */
    private fun checkTensors(stored: Map<String, Stored>, expected: Map<String, Stored>, data: Long) {
        require(stored.keys == expected.keys) {
            "it has the tensors ${stored.keys.sorted().toString().take(200)}, expected ${expected.keys.sorted()}"
        }
        for ((name, tensor) in stored) {
            val other = expected.getValue(name)
            require(tensor.dtype == other.dtype && tensor.shape == other.shape) {
                "$name is ${tensor.dtype.take(20)} ${tensor.shape}, expected ${other.dtype} ${other.shape}"
            }
            val (bytes, needed) = listOf(tensor, other).map { it.end - it.begin }
            require(bytes == needed) { "$name has $bytes bytes, expected $needed" }
        }
        var end = 0L
        for ((name, tensor) in stored.entries.sortedWith(compareBy({ it.value.begin }, { it.value.end }))) {
            require(tensor.begin == end) { "$name begins at byte ${tensor.begin} of the data, expected $end" }
            val itemBytes = if (tensor.dtype == "F16") Short.SIZE_BYTES else Int.SIZE_BYTES
            require((data + end) % itemBytes == 0L) { "$name begins at byte ${data + end}, expected a multiple of $itemBytes" }
            end = tensor.end
        }
        require(size - data == end) { "it has ${size - data} bytes of data, its header says $end" }
    }

    private fun tokens(begin: Long, count: Int): List<Int> {
        val ids = bytes(begin, count * Int.SIZE_BYTES).asIntBuffer()
        return List(count) {
            val id = ids.get(it)
            require(id in 0 until manifest.vocabSize) { "token $it is $id, expected 0 to ${manifest.vocabSize - 1}" }
            id
        }
    }

    private fun buffer(kv: KVBuffer, position: Int, start: Int, begin: Long): CacheBuffer {
        val rows = bufferRows(manifest, kv, usedRows(kv, position, start))
        if (rows == 0) return CacheBuffer(kv, 0, allocate) // some systems map no empty range
        return CacheBuffer(kv, rows) { count ->
            if (mapped) channel.map(FileChannel.MapMode.PRIVATE, begin, count).order(ByteOrder.LITTLE_ENDIAN)
            else read(begin, allocate(count))
        }
    }

    private fun bytes(begin: Long, count: Int) = read(begin, ByteBuffer.allocate(count).order(ByteOrder.LITTLE_ENDIAN))

    private fun read(begin: Long, bytes: ByteBuffer): ByteBuffer {
        val count = bytes.remaining()
        val window = bytes.duplicate()
        while (window.hasRemaining()) {
            if (channel.read(window, begin + count - window.remaining()) < 0) throw IOException("it ends at byte $size")
        }
        return bytes
    }
}

private fun shown(value: JsonElement?) = value.toString().take(60)
