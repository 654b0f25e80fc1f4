package gemmamtp.core

import java.nio.FloatBuffer
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

private const val VOCAB = 97
private const val EOS = 1

/** The token that follows a text: mostly the next id, which the drafter drafts, and sometimes the end token. */
private fun choiceAfter(text: List<Int>): Int {
    val sum = text.withIndex().sumOf { (i, token) -> (i + 3L) * token }
    return if (sum % 5 == 0L) (sum % VOCAB).toInt() else (text.last() + 1) % VOCAB
}

/** An engine whose target follows [choiceAfter] and whose drafter always drafts the next id. */
private class CountingEngine(override val manifest: Manifest) : Engine {
    override var cache = Cache(manifest)
    private val text get() = cache.tokens

    override fun prefill(tokens: List<Int>, sampling: Chooser, start: Int, goOn: (Int) -> Boolean): Round {
        assertEquals(text.take(start), tokens.take(start))
        if (!goOn(start)) return Round(emptyList(), 0, emptyList(), emptyList())
        cache.rollBack(start)
        cache.append(tokens.drop(start))
        return Round(emptyList(), 0, listOf(choiceAfter(text)), listOf(0.0))
    }

    override fun draft(last: Int, numDraftTokens: Int) = (1..numDraftTokens).map { (last + it) % VOCAB }

    override fun verify(last: Int, drafts: List<Int>, sampling: Chooser): Round {
        val run = listOf(last) + drafts
        val tokens = accept(drafts, run.indices.asSequence().map { choiceAfter(text + run.take(it + 1)) })
        cache.append(run.take(tokens.size))
        return Round(drafts, tokens.lastIndex, tokens, tokens.map { 0.0 })
    }

    override fun score(state: FloatBuffer, token: Int) = throw AssertionError("no rule was asked for")
}

/** Where texts end, and that they are the same whatever is drafted. */
class RoundsTest {
    private val manifest = smallManifest(vocabSize = VOCAB, maxSeqLen = 200, maxDraftTokens = 8, eos = setOf(EOS))

    private fun write(prompt: List<Int>, maxNewTokens: Int, drafts: Int?, stats: Stats = Stats()): List<Int> {
        val planner = DraftLength(8, Costs(8))
        val options = Options(maxNewTokens, drafts)
        return Rounds(CountingEngine(manifest), prompt, options, stats, planner).asSequence().flatMap { it.tokens }.toList()
    }

    private fun plain(prompt: List<Int>, maxNewTokens: Int): List<Int> {
        val text = prompt.toMutableList()
        while (text.size < minOf(prompt.size + maxNewTokens, manifest.maxSeqLen)) {
            text.add(choiceAfter(text))
            if (text.last() == EOS) break
        }
        return text.drop(prompt.size)
    }

    @Test
    fun sameTextWhateverIsDrafted() {
        val reasons = HashSet<String>()
        for (first in 2 until 60) {
            for (maxNewTokens in listOf(1, 2, 3, 30, 500)) {
                for (drafts in listOf(0, 1, 3, 8, null)) {
                    val stats = Stats()
                    val written = write(listOf(first, 7), maxNewTokens, drafts, stats)
                    assertEquals(plain(listOf(first, 7), maxNewTokens), written)
                    assertEquals(stats.accepted, stats.acceptedByPosition.sum())
                    // Each round adds its accepted drafts and one more, unless a draft is the end token.
                    val missing = stats.rounds + stats.accepted - (written.size - 1)
                    assertTrue(missing in 0..(if (stats.finishReason == "eos") 1 else 0))
                    reasons.add(stats.finishReason)
                }
            }
        }
        assertEquals(setOf("eos", "length", "max_seq_len"), reasons)
    }

    @Test
    fun acceptedDraftsSaveRounds() {
        val stats = Stats()
        val written = write(listOf(5, 7), 40, 4, stats)
        assertTrue(stats.accepted > 0 && stats.accepted < stats.drafted)
        assertEquals(written.size, 1 + stats.rounds + stats.accepted)
    }

    @Test
    fun impossiblePromptsAndOptions() {
        for (
            (expected, ask) in listOf(
                "the prompt is empty" to { write(emptyList(), 5, 0) },
                "the prompt has 200 tokens, the bundle's context has 200" to { write(List(200) { 3 }, 5, 0) },
                "the prompt has token id 97, expected 0 to 96" to { write(listOf(97), 5, 0) },
                "9 draft tokens a round were asked for" to { write(listOf(2), 5, 9) },
                "0 new tokens were asked for" to { write(listOf(2), 0, 0) },
            )
        ) {
            assertTrue(expected in assertFailsWith<InputError> { ask() }.message!!)
        }
    }

    @Test
    fun streamsReuseTheCacheOfTheLastOne() {
        val engine = CountingEngine(manifest)
        val decoder = Decoder(engine, null, null, DraftLength(8, Costs(8)))
        val first = decoder.stream(intArrayOf(4, 7), Options(12, null))
        val written = first.asSequence().map { it.id }.toList()
        val prompt = listOf(4, 7) + written + listOf(9, 9)
        val next = decoder.stream(prompt.toIntArray(), Options(5, null))
        assertEquals(plain(prompt, 5), next.asSequence().map { it.id }.toList())
        assertTrue(next.stats.reusedTokens >= 2 + written.size - 1)
        assertFailsWith<IllegalStateException> { first.next() }
    }

    @Test
    fun aCancelledStreamEndsWithItsNextToken() {
        val stream = Decoder(CountingEngine(manifest), null, null, DraftLength(8, Costs(8))).stream(intArrayOf(5), Options(50, 4))
        stream.next()
        stream.cancel()
        stream.next()
        assertEquals(false, stream.hasNext())
        assertEquals("cancelled", stream.stats.finishReason)
    }

    @Test
    fun aStreamThatIsCancelledBeforeItsPromptIsRunHasNoToken() {
        val engine = CountingEngine(manifest)
        val decoder = Decoder(engine, null, null, DraftLength(8, Costs(8)))
        val seen = ArrayList<Pair<Int, Int>>()
        val stream = decoder.stream(intArrayOf(5, 6), Options(50, 4)) { done, total -> seen.add(done to total) }
        stream.cancel()
        assertEquals(false, stream.hasNext())
        assertFailsWith<NoSuchElementException> { stream.next() }
        assertEquals("cancelled", stream.stats.finishReason)
        assertEquals(listOf(0 to 2), seen)
        assertEquals(0, engine.cache.position)
    }

    @Test
    fun forgottenTextsAreRunAgainEvenIfTheirStreamGoesOn() {
        val decoder = Decoder(CountingEngine(manifest), null, null, DraftLength(8, Costs(8)))
        val stream = decoder.stream(intArrayOf(4, 7), Options(12, 4))
        stream.next()
        decoder.forget()
        assertEquals(plain(listOf(4, 7), 12).drop(1), stream.asSequence().map { it.id }.toList())
        for (reused in listOf(0, 1)) {
            val again = decoder.stream(intArrayOf(4, 7), Options(12, 4))
            assertEquals(plain(listOf(4, 7), 12), again.asSequence().map { it.id }.toList())
            assertEquals(reused, again.stats.reusedTokens)
        }
        decoder.forget() // also where the next prompt is stopped at once
        assertEquals(false, decoder.stream(intArrayOf(4, 7), Options(12, 4)).apply { cancel() }.hasNext())
        val again = decoder.stream(intArrayOf(4, 7), Options(12, 4))
        again.next()
        assertEquals(0, again.stats.reusedTokens)
    }

    @Test
    fun countsAreOfTheTokensThatWereGivenOut() {
        for (last in 1..30) {
            val stream = Decoder(CountingEngine(manifest), null, null, DraftLength(8, Costs(8))).stream(intArrayOf(5), Options(50, 4))
            while (stream.hasNext() && stream.tokens.size < last) {
                if (stream.tokens.size == last - 1) stream.cancel()
                stream.next()
                // The prefill gives the first token.
                assertEquals(stream.tokens.size - 1, stream.stats.tokens)
                assertEquals(stream.stats.accepted, stream.stats.acceptedByPosition.sum())
            }
            val ended = stream.tokens.last() == EOS
            assertEquals(if (ended) "eos" else "cancelled", stream.stats.finishReason)
        }
    }
}
