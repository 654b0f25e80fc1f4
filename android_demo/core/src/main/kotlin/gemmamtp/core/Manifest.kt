@file:JvmName("Manifests")

package gemmamtp.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParseException
import com.google.gson.JsonParser
import java.io.File
import java.io.IOException
import java.nio.charset.StandardCharsets
import java.security.MessageDigest

/** The newest format that is read; format 2 is as well. */
internal const val FORMAT_VERSION = 3

/** The name of the file that makes a folder a bundle. */
public const val MANIFEST: String = "manifest.json"

internal const val EMBEDDING = "embed_tokens"
internal const val PER_LAYER = "embed_tokens_per_layer"
internal const val HEAD = "head"

/** Names that tables can have: the head's is there where it is not the embedding. */
internal val TABLES = listOf(EMBEDDING, PER_LAYER, HEAD)

/** Files that readers read if they are there. */
private val READ_BY_NAME = listOf(TOKENIZER, "chat_template.jinja")
private const val MANIFEST_EXPECTED = "the manifest of a bundle; export it again"

private val KV_TYPES = mapOf("float32" to KVType.FLOAT32, "float16" to KVType.FLOAT16)

/** Sliding layers' buffers move by these: kernels sum blocks of so many rows, which then stay the same blocks. */
internal const val SLIDE_ROWS = 128

/** What the system property `os.arch` calls the processor. */
private val ARM64_MACHINES = listOf("aarch64", "arm64")

/** Receives the progress of reading files. */
public fun interface Progress {
    /** Called with the name of a file and the number of its bytes that were read since the last call. */
    public fun done(name: String, bytes: Long)
}

/**
 * Keys or values of one layer that stores them.
 *
 * @property name of the graphs' input; the output that updates it ends in `_out`.
 * @property sliding whether the layer's type is `sliding_attention`.
 * @property numKeyValueHeads N.
 * @property headDim D.
 * @property type of its numbers.
 * @property layout names of its dimensions in order: `num_key_value_heads`, `rows` and `head_dim`.
 */
public class KVBuffer(
    public val name: String,
    public val sliding: Boolean,
    public val numKeyValueHeads: Int,
    public val headDim: Int,
    public val type: KVType = KVType.FLOAT32,
    layout: List<String> = HEADS_FIRST,
) {
    /** Index of the dimension of the rows. */
    public val rowsAxis: Int = layout.indexOf("rows")

    /** Dimensions in order; that of the rows is 0. */
    public val sizes: List<Int> =
        layout.map { mapOf("num_key_value_heads" to numKeyValueHeads, "head_dim" to headDim)[it] ?: 0 }

    /** Dimensions in order, with so many rows. */
    public fun shape(rows: Int): List<Long> =
        sizes.mapIndexed { axis, size -> (if (axis == rowsAxis) rows else size).toLong() }
}

/** A graph: the name of its file in the bundle, and the names of its inputs and outputs, in order. */
public class Graph(public val file: String, public val inputs: List<String>, public val outputs: List<String>)

/** Size in bytes and hexadecimal sha256 of a file of the bundle. */
public class FileMetadata(public val size: Long, public val sha256: String)

/** Rows of a table in a file of the bundle: [offset] of the first in bytes, and how many [rows]. */
internal class Part(val file: String, val offset: Long, val rows: Int)

/** All rows of a table, or of its scales, whose [dtype] is empty for a table itself. */
internal class Rows(val parts: List<Part>, val dtype: String = "")

/**
 * The manifest's entry of an embedding table.
 *
 * @property rows one for each token.
 * @property columns numbers in a row.
 * @property rowBytes bytes from one row to the next.
 * @property encoding how numbers are stored: `float32`, `int8`, `uint8`, `uint4`, `uint3` or `uint2`.
 * @property groupSize consecutive numbers of a row that share a scale.
 * @property scales null where numbers have none.
 */
internal class TableMetadata(
    val rows: Int,
    val columns: Int,
    val rowBytes: Int,
    val encoding: String,
    val groupSize: Int,
    val data: Rows,
    val scales: Rows?,
)

/**
 * What a runtime needs to run a bundle; FORMAT.md specifies it in prose.
 *
 * @property minRuntime the oldest version of the backend's library that runs the graphs; null where it is not known.
 * @property vocabSize V.
 * @property hiddenSize E of the target.
 * @property slidingWindow how many positions a sliding layer attends to.
 * @property finalLogitSoftcapping c of the target's softcap of logits, c * tanh(x / c); 0 for none.
 * @property maxSeqLen tokens of prompt and answer together.
 * @property defaultDraftTokens K if the user does not choose one.
 * @property maxDraftTokens the largest K.
 * @property limits largest sizes of the dimensions that vary: `num_tokens` (T), `num_outputs` (R), `cache_rows` and
 *     `window_rows` (S of full and sliding layers).
 * @property rowMultiple T and R are padded to a multiple of this.
 * @property sampling how tokens are chosen if the user does not say.
 * @property repetitionPenalty the same of that rule; 1 is none.
 * @property bos id of the beginning-of-text token.
 * @property eos ids of the tokens that end a text.
 * @property suppressed ids of tokens that the target never chooses.
 * @property channels ids of the tokens that begin and end a part of the text that is no answer, by the part's name.
 * @property parts what each channel has around its content, and how calls of tools are written, by the channel's name.
 * @property chat form of the prompts of chats, null if the bundle has none.
 * @property conversations forms of the prompts of conversations, with and without tools and thinking.
 * @property tools what `conversations` can offer to the model: a JSON list of functions with JSON Schemas; null for nothing.
 * @property digest hexadecimal sha256 of the manifest itself, which differs between bundles.
 */
public class Manifest internal constructor(
    public val backend: String,
    public val minRuntime: String?,
    public val recipe: String,
    public val vocabSize: Int,
    internal val hiddenSize: Int,
    internal val slidingWindow: Int,
    internal val finalLogitSoftcapping: Double,
    public val maxSeqLen: Int,
    public val defaultDraftTokens: Int,
    public val maxDraftTokens: Int,
    public val limits: Map<String, Int>,
    internal val rowMultiple: Int,
    public val sampling: Sampling,
    public val repetitionPenalty: Double,
    public val bos: Int,
    public val eos: Set<Int>,
    internal val suppressed: Set<Int>,
    internal val channels: Map<String, Pair<Int, Int>>,
    internal val parts: Map<String, PartForm>,
    public val kv: List<KVBuffer>,
    public val graphs: Map<String, Graph>,
    internal val tables: Map<String, TableMetadata>,
    public val files: Map<String, FileMetadata>,
    internal val chat: ChatFormat?,
    internal val conversations: List<ConversationForm>,
    public val tools: String?,
    public val digest: String,
) {
    /**
     * The largest number of bytes that the open bundle takes: its weights, which both runtimes repack into their own memory,
     * and the KV cache of a text that fills the context, twice, because old and new buffers are there while it grows. The
     * per-layer table is mapped, and the system may drop its pages.
     */
    public val memoryNeeded: Long
        get() {
            fun filesOf(table: String) =
                tables[table]?.let { listOfNotNull(it.data, it.scales) }.orEmpty().flatMap { rows -> rows.parts.map { it.file } }
            val mapped = filesOf(PER_LAYER) - tables.keys.filter { it != PER_LAYER }.flatMap(::filesOf).toSet()
            val weights = files.filterKeys { it !in mapped }.values.sumOf { it.size }
            val cache = kv.sumOf { it.shape(maxRows(this, it)).fold(it.type.bytes.toLong(), Long::times) }
            return weights + 2 * cache
        }
}

/**
 * Read a bundle's manifest and check that every file is there and has its size.
 *
 * @param digest hexadecimal sha256 that the manifest must have; null for any.
 * @throws InputError the directory is no bundle, or its manifest has another digest, another format, a feature that this
 *     version does not know, or is malformed; a file is missing, or the manifest does not name weights.
 */
@JvmOverloads
public fun readManifest(bundle: File, digest: String? = null): Manifest {
    val path = File(bundle, MANIFEST)
    if (!path.exists()) throw InputError("$bundle: not a bundle, $MANIFEST is missing; expected the output of `export`")
    val manifest = readManifestFile(path, digest)
    for ((name, metadata) in manifest.files) {
        val file = File(bundle, name)
        if (!file.isFile) throw InputError("$file: named in $MANIFEST but absent; the bundle is incomplete, copy it again")
        if (file.length() != metadata.size) {
            throw InputError("$file: is ${file.length()} bytes, $MANIFEST says ${metadata.size}; copy the bundle again")
        }
    }
    bundle.list().orEmpty().sorted().firstOrNull { (it.endsWith(".weights") || it in READ_BY_NAME) && it !in manifest.files }?.let {
        throw InputError("$bundle/$it: not named in $MANIFEST, so it cannot be checked; export the bundle again")
    }
    return manifest
}

/** Read a manifest alone, as [readManifest] does. */
internal fun readManifestFile(path: File, digest: String? = null): Manifest {
    val content = readBytes(path, MANIFEST_EXPECTED)
    val actual = sha256(content)
    if (digest != null && digest.lowercase() != actual) {
        throw InputError("$path: has the sha256 $actual, expected $digest; this is not the bundle that was meant")
    }
    return parseManifest(parseJson(content, path, MANIFEST_EXPECTED), "$path", actual)
}

/** Names of the files whose sha256 is not the manifest's; throws InputError if one cannot be read. */
internal fun changedFiles(bundle: File, manifest: Manifest, progress: Progress = Progress { _, _ -> }): List<String> =
    manifest.files.filter { (name, metadata) ->
        try {
            fileSha256(File(bundle, name), progress) != metadata.sha256
        } catch (error: IOException) {
            throw InputError("${File(bundle, name)}: cannot be read (${error.message}); copy the bundle again", error)
        }
    }.keys.toList()

/** Hexadecimal sha256 of a file, which is read in blocks. */
internal fun fileSha256(file: File, progress: Progress = Progress { _, _ -> }): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val block = ByteArray(1 shl 18)
    file.inputStream().use { stream ->
        while (true) {
            val count = stream.read(block)
            if (count < 0) break
            digest.update(block, 0, count)
            progress.done(file.name, count.toLong())
        }
    }
    return hex(digest.digest())
}

/** Hexadecimal sha256 of bytes. */
internal fun sha256(content: ByteArray) = hex(MessageDigest.getInstance("SHA-256").digest(content))

internal fun hex(bytes: ByteArray) = bytes.joinToString("") { "%02x".format(it) }

/**
 * Parse a JSON file.
 *
 * @param expected what the error says was expected, and what to do.
 * @throws InputError the file cannot be read, or is not JSON.
 */
internal fun readJson(path: File, expected: String): JsonElement = parseJson(readBytes(path, expected), path, expected)

private fun readBytes(path: File, expected: String): ByteArray =
    try {
        path.readBytes()
    } catch (error: IOException) {
        throw InputError("$path: cannot be read (${error.message}); expected $expected", error)
    }

internal fun parseJson(content: ByteArray, path: File, expected: String): JsonElement =
    try {
        JsonParser.parseString(String(content, StandardCharsets.UTF_8))
    } catch (error: JsonParseException) {
        throw InputError("$path: cannot be read as JSON (${oneLine(error)}); expected $expected", error)
    }

/** The first line of an error's message. */
internal fun oneLine(error: Throwable): String = (error.message ?: error.javaClass.simpleName).lineSequence().first()

/**
 * Read a manifest from a JSON document.
 *
 * @param origin what errors name.
 * @param digest hexadecimal sha256 of the document.
 * @param arm64 whether the processor is one: processors' kernels differ in the multiples of rows that they compute in
 *     the same way.
 * @throws InputError it has another format, or is incomplete or malformed.
 */
internal fun parseManifest(
    document: JsonElement,
    origin: String,
    digest: String,
    arm64: Boolean = System.getProperty("os.arch") in ARM64_MACHINES,
): Manifest {
    val version = (document as? JsonObject)?.get("format_version")
    if (version == null || version.toString() !in listOf("2", "$FORMAT_VERSION")) {
        val isNewer = version?.toString()?.toIntOrNull()?.let { it > FORMAT_VERSION } ?: false
        val remedy = if (isNewer) "update the app" else "export the bundle again"
        throw InputError("$origin: format_version is $version, this version reads 2 and $FORMAT_VERSION; $remedy")
    }
    if (version.toString() != "2") refuseUnknownFeatures(document, origin)
    try {
        checkForm(document, if (version.toString() == "2") FORM_2 else FORM_3)
        val raw = if (version.toString() == "2") fromFormat2(document) else document
        return parse(raw, digest, arm64).also { checkManifest(it, raw) }
    } catch (error: InputError) {
        throw InputError("$origin: ${error.message}; export the bundle again", error)
    } catch (error: RuntimeException) { // whatever is missing, of another type, or does not fit
        val reason = "${error.javaClass.simpleName}: ${oneLine(error)}"
        throw InputError("$origin: incomplete or malformed ($reason); export the bundle again", error)
    }
}

private fun parse(raw: JsonObject, digest: String, arm64: Boolean): Manifest {
    val target = raw.part("target")
    val drafts = raw.part("num_draft_tokens")
    return Manifest(
        backend = raw.part("backend").text("name"),
        minRuntime = raw.part("backend").get("min_runtime")?.asString,
        recipe = raw.text("recipe"),
        vocabSize = target.int("vocab_size"),
        hiddenSize = target.int("hidden_size"),
        slidingWindow = target.int("sliding_window"),
        finalLogitSoftcapping = target.get("final_logit_softcapping")?.takeIf { !it.isJsonNull }?.asDouble ?: 0.0,
        maxSeqLen = raw.int("max_seq_len"),
        defaultDraftTokens = drafts.int("default"),
        maxDraftTokens = drafts.int("max"),
        limits = listOf("num_tokens", "num_outputs", "cache_rows", "window_rows").associateWith(raw.part("limits")::int),
        rowMultiple = raw.int(if (arm64 && raw.has("row_multiple_arm64")) "row_multiple_arm64" else "row_multiple"),
        sampling = raw.optional("sampling")?.let {
            Sampling(it.number("temperature"), it.number("top_p"), topK = it.int("top_k"))
        } ?: Sampling(),
        repetitionPenalty = raw.optional("sampling")?.get("repetition_penalty")?.asDouble ?: 1.0,
        bos = raw.part("tokens").int("bos"),
        eos = raw.part("tokens").list("eos").map { it.asInt }.toSet(),
        suppressed = raw.part("tokens").get("suppressed")?.asJsonArray?.map { it.asInt }?.toSet().orEmpty(),
        channels = raw.part("tokens").optional("channels")?.asMap().orEmpty()
            .mapValues { (_, marks) -> marks.asJsonArray.let { it[0].asInt to it[1].asInt } }
            // Marks beyond the vocabulary never come.
            .filterValues { (begin, end) -> maxOf(begin, end) < target.int("vocab_size") },
        parts = raw.part("tokens").optional("parts")?.asMap().orEmpty().mapValues { (_, form) -> partForm(form.asJsonObject) },
        kv = raw.part("kv").list("buffers").map { buffer(it.asJsonObject) },
        graphs = raw.part("graphs").asMap().filterKeys { it in GRAPH_PORTS }.mapValues { (_, graph) ->
            val (inputs, outputs) = listOf("inputs", "outputs").map { way ->
                graph.asJsonObject.list(way).map { it.asJsonObject.text("name") }
            }
            Graph(graph.asJsonObject.text("file"), inputs, outputs)
        },
        tables = TABLES.filter { it == EMBEDDING || raw.part("tables").has(it) }
            .associateWith { table(raw.part("tables").part(it)) },
        files = raw.part("files").asMap().mapValues { (_, file) ->
            FileMetadata(file.asJsonObject.get("size").asLong, file.asJsonObject.text("sha256"))
        },
        chat = raw.optional("chat")?.let(::chatFormat),
        conversations = raw.get("conversations")?.asJsonArray?.map { conversationForm(it.asJsonObject) }.orEmpty(),
        tools = raw.get("tools")?.toString(),
        digest = digest,
    )
}

private fun partForm(entry: JsonObject): PartForm {
    val (before, after, syntax, quote) = listOf("before", "after", "syntax", "quote").map { entry.get(it)?.asString.orEmpty() }
    return PartForm(before, after, syntax, quote)
}

private fun table(entry: JsonObject): TableMetadata {
    val (rows, columns, rowBytes) = listOf("rows", "columns", "row_bytes").map(entry::int)
    val scales = entry.optional("scales")
    return TableMetadata(
        rows, columns, rowBytes, entry.text("encoding"), entry.int("group_size"), rows(entry.part("data"), ""),
        scales?.let { rows(it, it.text("dtype")) },
    )
}

private fun rows(entry: JsonObject, dtype: String) = Rows(
    entry.list("parts").map { it.asJsonObject }.map { Part(it.text("file"), it.required("offset").asLong, it.int("rows")) },
    dtype,
)

private fun buffer(entry: JsonObject): KVBuffer {
    val layout = entry.list("layout").map { it.asString }
    val type = KV_TYPES[entry.text("dtype")]
    require(type != null && layout.sorted() == HEADS_FIRST.sorted()) {
        "kv buffer ${entry.text("name")} is ${entry.text("dtype")} $layout, expected ${KV_TYPES.keys.joinToString(" or ")}" +
            " and an order of ${HEADS_FIRST.joinToString()}"
    }
    val sliding = entry.text("layer_type") == "sliding_attention"
    return KVBuffer(entry.text("name"), sliding, entry.int("num_key_value_heads"), entry.int("head_dim"), type, layout)
}

/** The smallest multiple of [multiple] that is not below [count]; both are positive. */
internal fun roundUp(count: Int, multiple: Int): Int = (count + multiple - 1) / multiple * multiple

/**
 * Rows of a sliding layer's buffer: those that a pass attends to and writes, and those of one move.
 *
 * @param slidingWindow how many positions a sliding layer attends to; the drafter attends to one more.
 * @param numTokens the largest T of a pass.
 */
internal fun windowRows(slidingWindow: Int, numTokens: Int): Long =
    (slidingWindow + 2L + numTokens + SLIDE_ROWS + SLIDE_ROWS - 1) / SLIDE_ROWS * SLIDE_ROWS

private fun JsonObject.required(name: String): JsonElement = requireNotNull(get(name)) { "$name is missing" }
private fun JsonObject.part(name: String): JsonObject = required(name).asJsonObject
private fun JsonObject.optional(name: String): JsonObject? = get(name)?.takeIf { !it.isJsonNull }?.asJsonObject
private fun JsonObject.list(name: String) = required(name).asJsonArray
private fun JsonObject.text(name: String): String = required(name).asString
private fun JsonObject.int(name: String): Int =
    requireNotNull(required(name).toString().toIntOrNull()) { "$name is ${get(name)}, expected a whole number" }
private fun JsonObject.number(name: String): Double =
    requireNotNull(required(name).toString().toDoubleOrNull()) { "$name is ${get(name)}, expected a number" }
