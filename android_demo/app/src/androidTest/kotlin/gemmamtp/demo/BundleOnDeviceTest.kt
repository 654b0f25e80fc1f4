package gemmamtp.demo

import androidx.test.ext.junit.runners.AndroidJUnit4
import androidx.test.platform.app.InstrumentationRegistry
import gemmamtp.android.AndroidDevice
import gemmamtp.core.Conversation
import gemmamtp.core.Decoder
import gemmamtp.core.Options
import gemmamtp.core.Sampling
import gemmamtp.core.openDecoder
import gemmamtp.download.copyBundle
import org.junit.Assert.assertEquals
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Test
import org.junit.runner.RunWith
import java.io.File
import java.util.concurrent.CountDownLatch
import kotlin.concurrent.thread

private const val PROMPT = "Return the exception instance, or None if the future is done. "
private const val TOKENS = 60

/** The bundle in the APK's assets on this device: `make android-apk`, then `./gradlew connectedDebugAndroidTest`. */
@RunWith(AndroidJUnit4::class)
class BundleOnDeviceTest {
    private val context = InstrumentationRegistry.getInstrumentation().targetContext
    private val place = File(context.noBackupFilesDir, "test-bundle")

    @Before
    fun copy() {
        copyBundle(AssetSource(context.assets, "built-in"), place)
    }

    private fun open(): Decoder = openDecoder(place, ENGINES, device = AndroidDevice(context))

    private fun tokens(conversation: Conversation, drafts: Int?, sampling: Sampling): List<Int> =
        conversation.stream(PROMPT, Options(TOKENS, drafts, sampling)).asSequence().map { it.id }.toList()

    @Test
    fun draftsChangeNoToken() = open().use { decoder ->
        for (sampling in listOf(Sampling(), Sampling(temperature = 1.0, seed = 7))) {
            val plain = tokens(decoder.conversation(), 0, sampling)
            assertTrue(plain.size > 1)
            for (drafts in listOf(1, decoder.manifest.defaultDraftTokens, decoder.manifest.maxDraftTokens, null)) {
                assertEquals("$sampling, $drafts drafts", plain, tokens(decoder.conversation(), drafts, sampling))
            }
        }
    }

    @Test
    fun aSavedSessionGoesOnToTheSameTokens() = open().use { decoder ->
        val file = File(context.noBackupFilesDir, "test-session")
        val conversation = decoder.conversation()
        tokens(conversation, 0, Sampling())
        conversation.save(file)
        val opened = decoder.openSession(file)
        val stream = opened.stream(PROMPT, Options(TOKENS, null))
        assertEquals(tokens(decoder.conversation(), 0, Sampling()), stream.asSequence().map { it.id }.toList())
        assertTrue(stream.stats.reusedTokens > 0)
    }

    @Test
    fun closingWhileATextIsWrittenEndsIt() {
        val decoder = open()
        val begun = CountDownLatch(1)
        var error: Throwable? = null
        val writer = thread {
            error = assertThrows(IllegalStateException::class.java) {
                while (true) decoder.stream(PROMPT, Options(TOKENS, null)).forEach { _ -> begun.countDown() }
            }
        }
        begun.await()
        decoder.close()
        writer.join()
        assertTrue("$error", "closed" in error?.message.orEmpty())
    }
}
