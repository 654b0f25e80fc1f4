package gemmamtp.core

import java.io.File
import java.nio.FloatBuffer
import kotlin.math.tanh
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

private const val VOCAB = 200
private val SAMPLED = Sampling(1.2, 0.97, seed = 5)
private val FREQUENT = (0 until VOCAB step 3).toSet()
private val EACH_RULE = mapOf(
    "none" to Rules(),
    "suppressed" to Rules(FREQUENT),
    "bias" to Rules(logitBias = mapOf(7 to 9.0, 8 to -4.0, 150 to 6.5)),
    "repetition" to Rules(repetitionPenalty = 1.2),
    "repetition that raises" to Rules(repetitionPenalty = 0.98),
    "presence" to Rules(presencePenalty = 1.0),
    "presence that raises" to Rules(presencePenalty = -0.5),
    "frequency" to Rules(frequencyPenalty = 0.01),
    "frequency that raises" to Rules(frequencyPenalty = -0.001),
    "all" to Rules(FREQUENT, mapOf(7 to 9.0, 8 to -4.0), 1.05, 0.5, 0.004),
)
private val STATELESS: FloatBuffer = FloatBuffer.allocate(0)

/** Rules before the choice: vectors of all languages, and plain = speculative under each. */
class RulesTest {
    private fun hashed(suppressed: Set<Int> = emptySet(), work: (HashedEngine) -> Unit) =
        inTemporaryDirectory { directory: File -> work(HashedEngine(directory, VOCAB, suppressed)) }

    @Test
    fun chosenTokens() {
        val cases = vectors("rules.json")
        val tables = cases.getAsJsonArray("logits").map { row -> row.asJsonArray.map { it.asFloat }.toFloatArray() }
        val rows = cases.rows("choose")
        assertTrue(rows.size > 200)
        for ((number, row) in rows.withIndex()) {
            val all = tables[row.get("logits").asInt]
            // A stable sort: of equal ones the lower id comes first.
            val ids = all.indices.sortedByDescending { all[it] }.take(row.get("num_given").asInt).toIntArray()
            val values = row.getAsJsonObject("rules")
            val rules = Rules(
                values.ints("suppressed").toSet(),
                values.getAsJsonObject("logit_bias").entrySet().associate { it.key.toInt() to it.value.asDouble },
                values.get("repetition_penalty").asDouble,
                values.get("presence_penalty").asDouble,
                values.get("frequency_penalty").asDouble,
            )
            val (temperature, topP) = listOf("temperature", "top_p").map { row.get(it).asDouble }
            val sampling = Sampling(temperature, topP, row.string("seed").toULong().toLong(), row.get("top_k").asInt)
            val ruled = RuledChooser(sampling, rules, row.ints("prompt"), all.size, { _, token -> all[token] })
            row.ints("answer").forEach(ruled::commit)
            val given = FloatArray(ids.size) { all[ids[it]] }
            val choice = ruled.pick(given, ids, STATELESS, row.get("position").asInt)
            assertEquals(row.get("token").asInt, choice.token, "row $number")
        }
    }

    @Test
    fun tenThousandSampledTokensAreThoseOfPlainDecoding() = hashed { engine ->
        val free = write(engine, Options(10_000, 0, SAMPLED))
        for ((name, rules) in EACH_RULE) {
            engine.answer = emptyList()
            val plain = write(engine, Options(10_000, 0, SAMPLED, rules))
            assertEquals(10_000, plain.size)
            assertTrue(plain.none { it in rules.suppressed })
            engine.answer = plain
            val stats = Stats()
            assertEquals(plain, write(engine, Options(10_000, 5, SAMPLED, rules), stats), name)
            assertTrue(stats.acceptanceRate!! in 0.1..0.9, "$name: ${stats.acceptanceRate} accepted")
            assertEquals(plain.take(1000), write(engine, Options(1000, null, SAMPLED, rules)), name)
            assertEquals(name == "none", plain == free, name)
        }
    }

    @Test
    fun greedyTokensAreTheLargestOfTheWholeVocabulary() = hashed { engine ->
        val strong = Rules(logitBias = (4 until VOCAB).associateWith { -60.0 })
        for ((name, rules) in EACH_RULE + ("biases on most" to strong)) {
            var beyond = 0
            val ruled = RuledChooser(Sampling(), rules, PROMPT, VOCAB, engine::score)
            val answer = ArrayList<Int>()
            for (i in 0 until 400) {
                val expected = (0 until VOCAB).filter { it !in rules.suppressed }.maxBy { token ->
                    var value = engine.logits[i][token] + (rules.logitBias[token] ?: 0.0)
                    if (token in PROMPT || token in answer) {
                        value *= if (value > 0) 1 / rules.repetitionPenalty else rules.repetitionPenalty
                    }
                    val count = answer.count { it == token }
                    value - rules.frequencyPenalty * count - if (count > 0) rules.presencePenalty else 0.0
                }
                val (logits, ids) = engine.largest(i)
                val choice = ruled.pick(logits, ids, FloatBuffer.wrap(engine.states[i]), i)
                assertEquals(expected, choice.token, "$name, token $i")
                val ownLogprob = engine.logits[i][choice.token] - logits[0].toDouble() + logProbability(logits, 0)
                assertEquals(ownLogprob, choice.logprob, 1e-9)
                if (choice.token !in ids) beyond++
                answer.add(choice.token)
            }
            // Rules that bring up tokens which are not among the bundle's: the last one by looking at all tokens.
            if (name in listOf("bias", "all", "biases on most")) assertTrue(beyond > 0, name)
        }
    }

    @Test
    fun scoresAreThoseOfTheHead() = hashed { engine ->
        for (token in 0 until VOCAB step 7) {
            val product = engine.head[token].indices.sumOf { engine.head[token][it].toDouble() * engine.states[3][it] }
            val expected = (SOFTCAP * tanh(product / SOFTCAP)).toFloat()
            assertEquals(expected, engine.score(FloatBuffer.wrap(engine.states[3]), token))
        }
    }

    @Test
    fun forbiddenDraftsAreNotVerified() = hashed { engine ->
        val rules = Rules(FREQUENT)
        val plain = write(engine, Options(300, 0, SAMPLED, rules))
        val drafting = object : Engine by engine {
            override fun draft(last: Int, numDraftTokens: Int) = listOf(1, 2, 3, 4).take(numDraftTokens)
        }
        val stats = Stats()
        assertEquals(plain, write(drafting, Options(300, 4, SAMPLED, rules), stats))
        // 3 is suppressed; before the end there is room for fewer.
        assertEquals(setOf(0, 1, 2), stats.draftedLengths.keys.toSet())
    }

    @Test
    fun whatTheBundleSuppressesIsNotChosen() {
        val left = setOf(5, 17, 23)
        val rules = Rules((0 until VOCAB).toSet() - left)
        hashed { assertEquals(left, write(it, Options(50, 0, SAMPLED, rules)).toSet()) }
        hashed(setOf(17, VOCAB + 9)) { assertEquals(setOf(5, 23), write(it, Options(50, 0, SAMPLED, rules)).toSet()) }
        hashed(left) { engine ->
            val error = assertFailsWith<InputError> { write(engine, Options(50, 0, SAMPLED, rules)) }
            assertEquals("the rules allow no token at position 3 of the text; suppress fewer tokens", error.message)
        }
    }

    @Test
    fun tokensBeforeOneThatCannotBeChosenAreGivenOut() = hashed { engine ->
        val chooser = object : Chooser {
            override fun pick(logits: FloatArray, ids: IntArray, state: FloatBuffer, position: Int) =
                if (position < 6) Choice(9, -1.0) else throw InputError("the rules allow no token")
        }
        engine.prefill(PROMPT, chooser)
        val round = engine.verify(9, listOf(9, 9, 9, 9), chooser)
        assertEquals(listOf(9, 9), round.tokens)
        assertEquals(1, round.accepted)
        assertEquals(listOf(-1.0, -1.0), round.logprobs)
        assertEquals(5, engine.cache.position)
        assertFailsWith<InputError> { engine.verify(9, listOf(9), chooser) }
    }

    @Test
    fun aStreamEndsWhereNoTokenIsLeft() = hashed { engine ->
        var asked = 0
        val failing = object : Engine by engine {
            override fun verify(last: Int, drafts: List<Int>, sampling: Chooser): Round {
                asked++
                throw InputError("the rules allow no token")
            }
        }
        val stream = Decoder(failing, null, null, DraftLength(8, Costs(8))).stream(PROMPT.toIntArray(), Options(9, 0))
        stream.next()
        assertFailsWith<InputError> { stream.next() }
        assertEquals(false, stream.hasNext())
        assertFailsWith<NoSuchElementException> { stream.next() }
        assertEquals(1, asked)
    }

    @Test
    fun aNeutralRuleChangesNoBit() = hashed { engine ->
        val ruled = RuledChooser(SAMPLED, Rules(logitBias = mapOf(3 to 0.0)), PROMPT, VOCAB, engine::score)
        for (i in 0 until 200) {
            val (logits, ids) = engine.largest(i)
            val (one, other) = listOf(ruled, Sampled(SAMPLED)).map { it.pick(logits, ids, FloatBuffer.wrap(engine.states[i]), i) }
            assertEquals(other.token to other.logprob, one.token to one.logprob)
        }
    }

    @Test
    fun nothingIsAskedAfterTheFirstChoiceThatIsNoDraft() = hashed { engine ->
        val asked = ArrayList<Int>()
        val chooser = object : Chooser {
            override fun pick(logits: FloatArray, ids: IntArray, state: FloatBuffer, position: Int): Choice {
                asked.add(position)
                return Choice(9, 0.0)
            }
        }
        engine.prefill(PROMPT, chooser)
        val round = engine.verify(9, listOf(9, 9, 4, 9), chooser)
        assertEquals(listOf(3, 4, 5, 6), asked)
        assertEquals(listOf(9, 9, 9), round.tokens)
        assertEquals(2, round.accepted)
        assertEquals(6, engine.cache.position)
    }

    @Test
    fun impossibleRules() {
        for (
            (expected, make) in listOf(
                "repetition penalty is 0.0, expected 0.01 to 100; 1 is none" to { Rules(repetitionPenalty = 0.0) },
                "repetition penalty is NaN, expected 0.01 to 100; 1 is none" to { Rules(repetitionPenalty = Double.NaN) },
                "presence penalty is 2.5, expected -2 to 2" to { Rules(presencePenalty = 2.5) },
                "frequency penalty is -3.0, expected -2 to 2" to { Rules(frequencyPenalty = -3.0) },
                "the logit bias of token 4 is 101.0, expected -100 to 100; suppress a token that must never come" to
                    { Rules(logitBias = mapOf(4 to 101.0)) },
            )
        ) {
            assertEquals(expected, assertFailsWith<InputError> { make() }.message)
        }
        val manifest = smallManifest(VOCAB, 100, 8)
        for (rules in listOf(Rules(setOf(3, VOCAB)), Rules(logitBias = mapOf(VOCAB to 1.0)))) {
            val error = assertFailsWith<InputError> { checkOptions(manifest, Options(rules = rules)) }
            assertEquals("a rule names token id 200, expected 0 to 199", error.message)
        }
    }
}
