package gemmamtp.hosttest

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import gemmamtp.core.Clock
import gemmamtp.core.Conversation
import gemmamtp.core.Costs
import gemmamtp.core.Decoder
import gemmamtp.core.DraftLength
import gemmamtp.core.InputError
import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.Rules
import gemmamtp.core.Sampling
import gemmamtp.core.Tokenizer
import gemmamtp.core.WhenFull
import gemmamtp.core.changedFiles
import gemmamtp.core.chatTemplate
import gemmamtp.core.loadEngine
import gemmamtp.core.readManifest
import gemmamtp.core.uniform
import gemmamtp.demo.ENGINES
import java.io.File
import kotlin.system.exitProcess

/**
 * Generates the texts that a JSON document asks for, and prints each with its rounds as JSON, for `test_host.py` to
 * compare with runtime_ref. Arguments: the bundle, the file of the JSON document, and optionally that of a session, which the
 * conversation is opened from if it exists, and saved in and opened from after each text. Exit status 2 and one line for an
 * [InputError].
 */
fun main(arguments: Array<String>) {
    val (bundle, file) = arguments.map(::File)
    val session = arguments.getOrNull(2)?.let(::File)
    try {
        println(write(bundle, JsonParser.parseString(file.readText()).asJsonArray, session))
    } catch (error: InputError) {
        System.err.println(error.message)
        exitProcess(2)
    }
}

private fun write(bundle: File, texts: JsonArray, session: File?): JsonArray {
    val manifest = readManifest(bundle)
    changedFiles(bundle, manifest).firstOrNull()?.let { throw InputError("$it: sha256 differs from the manifest's") }
    val planner = DraftLength(manifest.maxDraftTokens, Costs(manifest.maxDraftTokens, manifest.rowMultiple))
    val tokenizer = Tokenizer(bundle, manifest)
    val engine = loadEngine(bundle, manifest, ENGINES)
    return Decoder(engine, tokenizer, chatTemplate(manifest), planner, SimulatedClock()).use { decoder ->
        var conversation = if (session?.exists() == true) decoder.openSession(session) else decoder.conversation()
        val results = JsonArray()
        for (text in texts) {
            results.add(written(conversation, text.asJsonObject))
            if (session == null) continue
            conversation.save(session)
            conversation = decoder.openSession(session)
        }
        results
    }
}

/** A clock that test_host.py simulates as well, because measured times decide the number of drafts. */
private class SimulatedClock : Clock {
    private var reads = 0
    private var now = 0.0

    override fun seconds(): Double {
        now += 0.001 * (1 + uniform(7, reads++))
        return now
    }
}

private fun written(conversation: Conversation, text: JsonObject): JsonObject {
    val options = Options(
        text.get("max_new_tokens").asInt,
        text.get("num_draft_tokens").takeIf { !it.isJsonNull }?.asInt,
        Sampling(
            text.get("temperature").asDouble,
            text.get("top_p").asDouble,
            text.get("seed").asString.toULong().toLong(),
            text.get("top_k").asInt,
        ),
        Rules(
            text.getAsJsonArray("suppress").map { it.asInt }.toSet(),
            text.getAsJsonObject("logit_bias").entrySet().associate { it.key.toInt() to it.value.asDouble },
            text.get("repetition_penalty").asDouble,
            text.get("presence_penalty").asDouble,
            text.get("frequency_penalty").asDouble,
        ),
        whenFull = WhenFull.valueOf(text.get("when_full").asString.uppercase()),
    )
    val stop = text.getAsJsonArray("stop").map { it.asString }
    val prompt = text.get("prompt")
    val stream = when {
        prompt.isJsonPrimitive -> conversation.stream(prompt.asString, options, stop)
        prompt.asJsonArray.get(0).isJsonObject -> conversation.chat(messages(prompt), options)
        else -> conversation.stream(prompt.asJsonArray.map { it.asInt }.toIntArray(), options, stop)
    }
    val cancelAfter = text.get("cancel_after")?.asInt
    val pieces = JsonArray()
    val rounds = JsonArray()
    val logprobs = JsonArray()
    var newest = stream.lastRound
    for (token in stream) {
        pieces.add(token.text)
        logprobs.add(token.logprob)
        if (stream.tokens.size == cancelAfter) stream.cancel()
        val round = stream.lastRound ?: continue
        if (round === newest) continue
        newest = round
        rounds.add(
            JsonObject().apply {
                add("drafts", numbers(round.drafts))
                addProperty("accepted", round.accepted)
                add("tokens", numbers(round.tokens))
            },
        )
    }
    return JsonObject().apply {
        add("tokens", numbers(stream.tokens))
        add("pieces", pieces)
        add("logprobs", logprobs)
        add("rounds", rounds)
        addProperty("text", stream.text)
        val stats = stream.stats
        addProperty("finish_reason", stats.finishReason)
        addProperty("drafted", stats.drafted)
        addProperty("accepted", stats.accepted)
        addProperty("num_rounds", stats.rounds)
        addProperty("reused", stats.reusedTokens)
        addProperty("dropped_tokens", stats.droppedTokens)
        addProperty("dropped_messages", stream.droppedMessages)
        addProperty("tokens_left", stream.tokensLeft)
        addProperty("decode_seconds", stats.decodeSeconds)
        add("drafted_by_position", numbers(stats.draftedByPosition))
        add("accepted_by_position", numbers(stats.acceptedByPosition))
        add("sources", JsonObject().apply { stats.sources.forEach { (name, of) -> addProperty(name, of.drafted) } })
    }
}

private fun messages(prompt: JsonElement) =
    prompt.asJsonArray.map { it.asJsonObject }.map { Message(it.get("role").asString, it.get("content").asString) }

private fun numbers(values: List<Int>) = JsonArray().apply { values.forEach { add(it) } }
