package android.content;

import android.content.res.AssetManager;
import android.os.PerformanceHintManager;
import android.os.PowerManager;
import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Comparator;
import java.util.stream.Stream;

/** Gives the stand-ins of services. */
public class Context {
    private static final File FILES = newFolder();
    public final PowerManager power = new PowerManager();
    public final PerformanceHintManager hints = new PerformanceHintManager();

    private static File newFolder() {
        try {
            File folder = Files.createTempDirectory("context").toFile();
            Runtime.getRuntime().addShutdownHook(new Thread(() -> remove(folder)));
            return folder;
        } catch (IOException error) {
            throw new AssertionError(error);
        }
    }

    private static void remove(File folder) {
        try (Stream<Path> files = Files.walk(folder.toPath())) {
            files.sorted(Comparator.reverseOrder()).forEach(file -> file.toFile().delete());
        } catch (IOException error) {
            throw new AssertionError(error);
        }
    }

    public Context getApplicationContext() {
        return this;
    }

    public AssetManager getAssets() {
        return new AssetManager();
    }

    /** One folder for each process, which goes with it. */
    public File getNoBackupFilesDir() {
        return FILES;
    }

    public final <T> T getSystemService(Class<T> service) {
        return service.cast(service == PowerManager.class ? power : hints);
    }
}
