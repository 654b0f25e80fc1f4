package gemmamtp.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParseException
import com.google.gson.JsonParser
import java.io.File
import java.io.IOException
import java.nio.charset.StandardCharsets
import java.security.MessageDigest

const val FORMAT_VERSION = 2
const val MANIFEST = "manifest.json"
val TABLES = listOf("embed_tokens", "embed_tokens_per_layer")

/** Rows that sliding layers' buffers move by: sums in blocks of so many rows stay the same sums. */
const val SLIDE = 128

/** As platforms call it. */
private val ARM64 = listOf("aarch64", "arm64")

/** Told what is being worked on and how many bytes of it were done. */
fun interface Progress {
    fun done(name: String, bytes: Long)
}

/** K or V of one storing layer: `[numKeyValueHeads, rows, headDim]` float32. */
class KVBuffer(val name: String, val sliding: Boolean, val numKeyValueHeads: Int, val headDim: Int)

/** A graph file and the names of its inputs and outputs, in order. */
class Graph(val file: String, val inputs: List<String>, val outputs: List<String>)

/** Size in bytes and hexadecimal sha256 of a file of the bundle. */
class FileFacts(val size: Long, val sha256: String)

/** Where something begins in a file of the bundle; `dtype` is that of scales. */
class Place(val file: String, val offset: Long, val dtype: String)

/** An embedding table; `scales` is null where numbers have none. */
class TableFacts(
    val rows: Int,
    val columns: Int,
    val rowBytes: Int,
    val encoding: String,
    val groupSize: Int,
    val data: Place,
    val scales: Place?,
)

/**
 * What a runtime needs to run a bundle; FORMAT.md specifies it in prose.
 *
 * @property limits the largest sizes of the dimensions that vary.
 * @property chat how a conversation is put to the model, null if the bundle does not say.
 * @property digest sha256 of the manifest itself: another one is another bundle.
 */
class Manifest(
    val backend: String,
    val recipe: String,
    val vocabSize: Int,
    val hiddenSize: Int,
    val slidingWindow: Int,
    val maxSeqLen: Int,
    val defaultDraftTokens: Int,
    val maxDraftTokens: Int,
    val limits: Map<String, Int>,
    val rowMultiple: Int,
    val sampling: Sampling,
    val bos: Int,
    val eos: Set<Int>,
    val kv: List<KVBuffer>,
    val graphs: Map<String, Graph>,
    val tables: Map<String, TableFacts>,
    val files: Map<String, FileFacts>,
    val chat: ChatFormat?,
    val digest: String,
)

/**
 * Read a bundle's manifest and check that every file is there with its size.
 *
 * @throws InputError not a bundle, a newer format, a broken manifest, or an incomplete bundle.
 */
fun readManifest(bundle: File): Manifest {
    val path = File(bundle, MANIFEST)
    if (!path.exists()) throw InputError("$bundle: not a bundle, $MANIFEST is missing; expected the output of `export`")
    val manifest = parseManifest(readJson(path, "the manifest of a bundle; export it again"), "$path", fileSha256(path))
    for ((name, facts) in manifest.files) {
        val file = File(bundle, name)
        if (!file.isFile) throw InputError("$file: named in $MANIFEST but absent; the bundle is incomplete, copy it again")
        if (file.length() != facts.size) {
            throw InputError("$file: is ${file.length()} bytes, $MANIFEST says ${facts.size}; copy the bundle again")
        }
    }
    bundle.list().orEmpty().sorted().firstOrNull { it.endsWith(".weights") && it !in manifest.files }?.let {
        throw InputError("$bundle/$it: not named in $MANIFEST, so it cannot be checked; export the bundle again")
    }
    return manifest
}

/** Names of the files whose sha256 is not the manifest's; throws InputError if one cannot be read. */
fun changedFiles(bundle: File, manifest: Manifest, progress: Progress = Progress { _, _ -> }): List<String> =
    manifest.files.filter { (name, facts) ->
        try {
            fileSha256(File(bundle, name), progress) != facts.sha256
        } catch (error: IOException) {
            throw InputError("${File(bundle, name)}: cannot be read (${error.message}); copy the bundle again", error)
        }
    }.keys.toList()

/** Hexadecimal sha256 of a file, read block by block. */
fun fileSha256(file: File, progress: Progress = Progress { _, _ -> }): String {
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
    return digest.digest().joinToString("") { "%02x".format(it) }
}

/** Parse a JSON file, or say in one line why that cannot be done and what was [expected]. */
internal fun readJson(path: File, expected: String): JsonElement =
    try {
        JsonParser.parseString(String(path.readBytes(), StandardCharsets.UTF_8))
    } catch (error: IOException) {
        throw InputError("$path: cannot be read (${error.message}); expected $expected", error)
    } catch (error: JsonParseException) {
        throw InputError("$path: cannot be read as JSON (${oneLine(error)}); expected $expected", error)
    }

internal fun oneLine(error: Throwable): String = (error.message ?: error.javaClass.simpleName).lineSequence().first()

/**
 * The manifest in a JSON document.
 *
 * @param origin what errors name.
 * @param arm64 whether this is such a processor: they differ in how many rows their kernels sum alike.
 */
internal fun parseManifest(
    found: JsonElement,
    origin: String,
    digest: String,
    arm64: Boolean = System.getProperty("os.arch") in ARM64,
): Manifest {
    val version = (found as? JsonObject)?.get("format_version")
    if (version == null || version.toString() != FORMAT_VERSION.toString()) {
        throw InputError("$origin: format_version is $version, this version reads $FORMAT_VERSION; export it again")
    }
    try {
        return parse(found, digest, arm64).also(::check)
    } catch (error: RuntimeException) { // whatever is missing, of another type, or does not fit
        val reason = "${error.javaClass.simpleName}: ${oneLine(error)}"
        throw InputError("$origin: incomplete or malformed ($reason); export the bundle again", error)
    } catch (error: InputError) {
        throw InputError("$origin: ${error.message}; export the bundle again", error)
    }
}

private fun parse(raw: JsonObject, digest: String, arm64: Boolean): Manifest {
    val target = raw.part("target")
    val drafts = raw.part("num_draft_tokens")
    for (name in listOf("drafter", "two_stage", "source")) require(raw.has(name)) { "$name is missing" }
    return Manifest(
        backend = raw.part("backend").text("name"),
        recipe = raw.text("recipe"),
        vocabSize = target.int("vocab_size"),
        hiddenSize = target.int("hidden_size"),
        slidingWindow = target.int("sliding_window"),
        maxSeqLen = raw.int("max_seq_len"),
        defaultDraftTokens = drafts.int("default"),
        maxDraftTokens = drafts.int("max"),
        limits = raw.part("limits").asMap().mapValues { it.value.asInt },
        rowMultiple = raw.int(if (arm64 && raw.has("row_multiple_arm64")) "row_multiple_arm64" else "row_multiple"),
        sampling = raw.optional("sampling")?.let {
            Sampling(it.number("temperature"), it.number("top_p"), topK = it.int("top_k"))
        } ?: Sampling(),
        bos = raw.part("tokens").int("bos"),
        eos = raw.part("tokens").list("eos").map { it.asInt }.toSet(),
        kv = raw.part("kv").list("buffers").map { it.asJsonObject }.map {
            val sliding = it.text("layer_type") == "sliding_attention"
            KVBuffer(it.text("name"), sliding, it.int("num_key_value_heads"), it.int("head_dim"))
        },
        graphs = raw.part("graphs").asMap().mapValues { (_, graph) ->
            val (inputs, outputs) = listOf("inputs", "outputs").map { way ->
                graph.asJsonObject.list(way).map { it.asJsonObject.text("name") }
            }
            Graph(graph.asJsonObject.text("file"), inputs, outputs)
        },
        tables = TABLES.associateWith { table(raw.part("tables").part(it)) },
        files = raw.part("files").asMap().mapValues { (_, facts) ->
            FileFacts(facts.asJsonObject.get("size").asLong, facts.asJsonObject.text("sha256"))
        },
        chat = raw.optional("chat")?.let(::chatFormat),
        digest = digest,
    )
}

private fun table(facts: JsonObject): TableFacts {
    val (rows, columns, rowBytes) = listOf("rows", "columns", "row_bytes").map(facts::int)
    val scales = facts.optional("scales")
    return TableFacts(
        rows, columns, rowBytes, facts.text("encoding"), facts.int("group_size"), place(facts.part("data")),
        scales?.let(::place),
    )
}

private fun place(facts: JsonObject) =
    Place(facts.text("file"), facts.get("offset").asLong, facts.get("dtype")?.asString ?: "")

/** Throws where the parts of a manifest do not fit each other. */
private fun check(manifest: Manifest): Unit = with(manifest) {
    require(defaultDraftTokens in 0..maxDraftTokens) { "num_draft_tokens: default must be between 0 and max" }
    require(minOf(minOf(maxSeqLen, vocabSize), minOf(hiddenSize, slidingWindow)) >= 1) {
        "max_seq_len, vocab_size, hidden_size and sliding_window must be positive"
    }
    val tokens = limits.getValue("num_tokens")
    val outputs = limits.getValue("num_outputs")
    val rows = limits.getValue("cache_rows")
    require(minOf(minOf(tokens, outputs), minOf(rows, rowMultiple)) >= 1) { "limits and row_multiple must be positive" }
    require(rows >= maxSeqLen + rowMultiple - 1 && minOf(tokens, outputs) > maxDraftTokens) {
        "limits leave no room for max_seq_len or num_draft_tokens"
    }
    require(limits.getValue("window_rows") >= minOf(rows, windowRows(slidingWindow, tokens))) {
        "limits leave no room for sliding_window"
    }
    require(tokens % rowMultiple == 0 && outputs % rowMultiple == 0) { "limits are not multiples of row_multiple" }
    for (name in files.keys) require(File(name).name == name) { "files names '$name', outside the bundle" }
    for (name in listOf("target", "drafter")) {
        require(graphs.getValue(name).file in files) { "the file of graph $name is not in files" }
    }
    for ((name, table) in tables) {
        require(listOfNotNull(table.data, table.scales).all { it.file in files }) {
            "the file of table $name is not in files"
        }
        require(table.rows == vocabSize) { "table $name has not a row for each token" }
    }
    require(tables.getValue(TABLES[0]).columns == hiddenSize) { "table embed_tokens is not as wide as hidden_size" }
    require(kv.isNotEmpty() && kv.all { it.name in graphs.getValue("target").inputs }) {
        "kv.buffers are not inputs of graph target"
    }
    require(kv.all { minOf(it.numKeyValueHeads, it.headDim) >= 1 }) { "kv.buffers must have positive sizes" }
}

/** Rows of a sliding layer's buffer: what the next pass sees (the drafter one row more), writes, and one move. */
internal fun windowRows(slidingWindow: Int, numTokens: Int): Int =
    (slidingWindow + 2 + numTokens + SLIDE + SLIDE - 1) / SLIDE * SLIDE

private fun JsonObject.found(name: String): JsonElement = requireNotNull(get(name)) { "$name is missing" }
private fun JsonObject.part(name: String): JsonObject = found(name).asJsonObject
private fun JsonObject.optional(name: String): JsonObject? = get(name)?.takeIf { !it.isJsonNull }?.asJsonObject
private fun JsonObject.list(name: String) = found(name).asJsonArray
private fun JsonObject.text(name: String): String = found(name).asString
private fun JsonObject.int(name: String): Int =
    requireNotNull(found(name).toString().toIntOrNull()) { "$name is ${get(name)}, expected a whole number" }
private fun JsonObject.number(name: String): Double =
    requireNotNull(found(name).toString().toDoubleOrNull()) { "$name is ${get(name)}, expected a number" }
