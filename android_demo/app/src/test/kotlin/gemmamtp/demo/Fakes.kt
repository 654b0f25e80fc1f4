package gemmamtp.demo

import gemmamtp.core.FileMetadata
import gemmamtp.core.InputError
import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.Rules
import gemmamtp.core.Sampling
import gemmamtp.core.THOUGHT
import gemmamtp.core.Token
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.io.SequenceInputStream
import java.security.MessageDigest
import java.util.ArrayDeque
import java.util.concurrent.Executor

/** Runs jobs when the test calls [runAll]. */
class ManualWorker : Executor {
    private val jobs = ArrayDeque<Runnable>()

    override fun execute(job: Runnable) = jobs.addLast(job)

    fun runAll() {
        while (jobs.isNotEmpty()) jobs.removeFirst().run()
    }
}

/** Generates "0 1 2 ..."; a token takes one second plain, and half a second with drafts. */
class FakeModel(override val chats: Boolean = true, private val length: Int = 5, override val thinks: Boolean = false) : Model {
    override val contextTokens = 600
    override val defaultDraftTokens = 4
    override val sampling = Sampling(temperature = 0.7)
    override val rules = Rules(repetitionPenalty = 1.1)
    val prompts = ArrayList<List<String>>()
    val options = ArrayList<Options>()
    val thinking = ArrayList<Boolean>()
    var forgotten = 0
    var closed = false
    var beforeToken: (Int) -> Unit = {}
    var token: (Options, Int) -> Int = { _, at -> at }

    override fun write(messages: List<Message>, options: Options, thinking: Boolean): Writing {
        prompts.add(messages.map { "${it.role}: ${it.content}" })
        this.thinking.add(thinking)
        this.options.add(options)
        if (messages.last().content == "bad") throw InputError("the prompt is bad; write a better one")
        return object : Writing {
            var at = 0
            var cancelled = false
            override val counts
                get() = Counts(
                    at, at, (at - 1) * if (options.numDraftTokens == 0) 1.0 else 0.5, 0.5, 2.0, options.numDraftTokens,
                    tokensLeft = contextTokens - 10 - at, finish = if (hasNext()) "" else if (cancelled) "cancelled" else "eos",
                    prefillSeconds = 0.5,
                )

            override fun hasNext() = at < minOf(length, options.maxNewTokens) && !(cancelled && at > 0)
            override fun next(): Token {
                beforeToken(at)
                val text = "${at++} "
                if (thinking && at <= 2) return Token(token(options, at - 1), "", 0.0, THOUGHT, text)
                return Token(token(options, at - 1), text, 0.0, partText = text)
            }

            override fun cancel() {
                cancelled = true
            }
        }
    }

    override fun forget() {
        forgotten++
    }

    override fun close() {
        closed = true
    }
}

/** Opens its [model], or throws its [failure]. */
class FakeOpener(var needed: Long = 100) : Opener {
    var model = FakeModel()
    var failure: Throwable? = null
    var opened = 0

    override fun memoryNeeded(bundle: File) = needed

    override fun open(bundle: File, report: Report): Model {
        opened++
        failure?.let { throw it }
        report.at(Work(Step.CHECKING, 1, 2))
        return model
    }
}

/** A source of files in memory; reading the file [failing] throws after a few bytes. */
class FakeSource(
    override val name: String,
    private val content: Map<String, ByteArray>,
    private val failing: String? = null,
) : BundleSource {
    var opened = ArrayList<String>()
    var closed = false

    override fun open(name: String): InputStream? {
        opened.add(name)
        val bytes = content[name] ?: return null
        if (name != failing) return bytes.inputStream()
        val cut = object : InputStream() {
            override fun read() = throw IOException("the cable is out")
        }
        return SequenceInputStream(bytes.copyOf(3).inputStream(), cut)
    }

    override fun close() {
        closed = true
    }
}

/** The files of a minimal bundle with a valid manifest; its graphs cannot be loaded. */
fun tinyBundle(weights: String = "w".repeat(128)): Map<String, ByteArray> {
    val files = mapOf("model.pte" to weights.toByteArray(), "per_layer.table" to "p".repeat(1000).toByteArray())
    val metadata = files.map { (name, bytes) ->
        val digest = MessageDigest.getInstance("SHA-256").digest(bytes)
        name to FileMetadata(bytes.size.toLong(), digest.joinToString("") { "%02x".format(it) })
    }
    fun table(columns: Int, file: String) = """{
        "rows": 8, "columns": $columns, "encoding": "float32", "row_bytes": ${4 * columns}, "group_size": $columns,
        "data": {"file": "$file", "offset": 0}
    }"""
    fun kv(name: String, type: String) =
        """{"name":"$name","layer":0,"layer_type":"$type","num_key_value_heads":2,"head_dim":3}"""
    fun ports(vararg names: String) = names.joinToString(",", "[", "]") { """{"name":"$it"}""" }
    val target = """{"file": "model.pte",
        "inputs": ${ports("embedded", "per_layer", "position", "window_start", "output_rows", "key_0", "key_1")},
        "outputs": ${ports("top_logits", "top_ids", "state")}}"""
    val drafter = """{"file": "model.pte", "inputs": ${ports("embedded", "state", "position", "window_start", "key_0")},
        "outputs": ${ports("draft_token", "next_state")}}"""
    val config = """{"vocab_size": 8, "hidden_size": 4, "sliding_window": 10, "num_hidden_layers": 1, "layer_types": []}"""
    val manifest = """{
        "format_version": 2, "backend": {"name": "executorch"}, "recipe": "int4", "max_seq_len": 100,
        "target": $config, "drafter": {"text": $config}, "two_stage": null,
        "source": {"target": {}, "drafter": {}}, "num_draft_tokens": {"default": 4, "max": 8},
        "limits": {"num_tokens": 16, "num_outputs": 10, "cache_rows": 500, "window_rows": 256}, "row_multiple": 1,
        "tokens": {"bos": 2, "eos": [1], "pad": 0},
        "kv": {"buffers": [${kv("key_0", "full_attention")}, ${kv("key_1", "sliding_attention")}]},
        "graphs": {"target": $target, "drafter": $drafter},
        "tables": {"embed_tokens": ${table(4, "model.pte")}, "embed_tokens_per_layer": ${table(2, "per_layer.table")}},
        "files": {${metadata.joinToString { (name, it) -> """"$name": {"size": ${it.size}, "sha256": "${it.sha256}"}""" }}}
    }"""
    return files + ("manifest.json" to manifest.toByteArray())
}

/** A new empty folder, removed when the JVM ends. */
fun newFolder(): File = File.createTempFile("demo", null).apply {
    delete()
    mkdir()
    val folder = this
    Runtime.getRuntime().addShutdownHook(Thread { folder.deleteRecursively() })
}

fun put(folder: File, files: Map<String, ByteArray>) {
    folder.mkdirs()
    for ((name, bytes) in files) File(folder, name).writeBytes(bytes)
}
